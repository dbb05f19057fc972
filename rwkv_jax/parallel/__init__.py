"""One model on many devices: the mesh, the rules of what is split where, processes, plans for devices not at hand."""
