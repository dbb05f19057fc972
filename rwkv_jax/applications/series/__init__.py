"""Forecasts of time series: windows of any series, patches, and layers of any generation."""
