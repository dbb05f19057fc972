"""deploy/: the files parse, and what they say about this package is so."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

from rwkv_jax.cli import serve_ray
from rwkv_jax.config import ConfigError
from rwkv_jax.models import model_type
from rwkv_jax.recipes import official_run
from rwkv_jax.serving import ray_app
from rwkv_jax.serving.states.opening import is_shared

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def serve_configs() -> list[dict[str, Any]]:
    (own,) = documents("serve.yaml")
    (service,) = (each for each in documents("kuberay.yaml") if each["kind"] == "RayService")
    return [own, yaml.safe_load(service["spec"]["serveConfigV2"])]


@pytest.mark.parametrize("index", [0, 1], ids=["serve.yaml", "kuberay.yaml"])
def test_what_ray_is_told_is_there(index: int) -> None:
    (application,) = serve_configs()[index]["applications"]
    module, _, name = application["import_path"].partition(":")
    assert list(inspect.signature(getattr(importlib.import_module(module), name)).parameters) == ["args"]
    assert application["args"].keys() == {"flags"}
    command = serve_ray.parse(application["args"]["flags"])
    assert command.options.api_keys == Path("/config/api_keys")
    assert is_shared(command.options)
    (deployment,) = application["deployments"]
    assert deployment["name"] == ray_app.NAME
    assert deployment["ray_actor_options"]["num_gpus"] == 1


def test_both_run_the_same() -> None:
    ours, theirs = (config["applications"] for config in serve_configs())
    assert ours == theirs


def test_names_in_kubernetes_fit() -> None:
    found = {(each["kind"], each["metadata"]["name"]): each["spec"] for each in documents("kuberay.yaml")}
    assert found.keys() == {("StatefulSet", "redis"), ("Service", "redis"), ("RayService", "rwkv")}
    cluster = found["RayService", "rwkv"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    (worker,) = workers["template"]["spec"]["containers"]
    (deployment,) = serve_configs()[1]["applications"][0]["deployments"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert workers["replicas"] == deployment["num_replicas"]
    for group in (cluster["headGroupSpec"], workers):
        (container,) = group["template"]["spec"]["containers"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == {"model": "/model", "keys": "/config"}
        assert {volume["name"] for volume in group["template"]["spec"]["volumes"]} == set(mounted)


def test_the_compose_file_has_what_it_mounts() -> None:
    (compose,) = documents("compose.yaml")
    assert compose["services"].keys() == {"redis", "server"}
    server = compose["services"]["server"]
    mounts = {volume.split(":")[-2] for volume in server["volumes"]}
    assert {"/config/serve.yaml", "/model/model.pth", "/config/api_keys"} == mounts
    assert (DEPLOY / "serve.yaml").is_file()
    assert server["command"].split() == ["serve", "run", "/config/serve.yaml"]
    (own,) = documents("serve.yaml")
    assert server["ports"] == [f"127.0.0.1:{own['http_options']['port']}:{own['http_options']['port']}"]


def test_images_have_versions() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(DEPLOY.iterdir()))
    images = re.findall(r"^(?:FROM|\s*image:) (\S+)$", text, re.MULTILINE)
    assert len(images) == 6
    assert all(re.search(r":\d+\.\d+", image) for image in images)


@pytest.mark.parametrize("args", [{}, {"flags": "x", "port": "1"}])
def test_arguments_are_flags_only(args: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="must have flags"):
        serve_ray.build(args)


def test_unknown_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="`rwkv serve` does not take them"):
        serve_ray.build({"flags": "MODEL --slot 3"})
    assert "--slot" in capsys.readouterr().err


def test_sizes_of_states_in_the_docs() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| RWKV-7 ([\d.]+)B \| ([\d.]+) MiB \| ([\d,]+) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for size, mebibytes, count in rows:
        config = official_run(f"rwkv7_{size.replace('.', '_')}b", fsdp=1).model
        layer = jax.eval_shape(lambda config=config: model_type(config).initial_block_state(config, 1))
        num_bytes = config.num_layers * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layer))
        num_bytes += 4 * config.vocab_size
        assert mebibytes == f"{num_bytes / 2**20:.1f}"
        assert int(count.replace(",", "")) == 8 * 10**9 // num_bytes
