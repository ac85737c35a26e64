"""The Grafana dashboard asks for metrics that exist: ours, and those that Ray itself exports."""

import json
import re
from pathlib import Path

import ray

from pipeline.runtime import prometheus

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy/grafana/openseedvr.json"


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def asked() -> set[str]:
    return {name for query in queries() for name in re.findall(r"ray_\w+", query)}


def test_our_metrics_are_those_of_the_module():
    ours = {name for name in asked() if name.startswith("ray_openseedvr_")}
    assert ours
    source = Path(prometheus.__file__).read_text()
    for name in ours:
        plain = name.removeprefix("ray_").removesuffix("_total")
        known = plain in source or re.search(rf'"{plain.removeprefix("openseedvr_train_")}": "', source)
        assert known, f"{name} is counted nowhere"


def test_every_counter_of_the_data_stages_is_shown():
    counted = {f"ray_{name}_total" for name in prometheus._TAGS}
    assert counted <= asked()


def test_rays_metrics_are_rays():
    folder = Path(ray.__file__).parent
    sources = [
        *(folder / "dashboard").rglob("*.py"),
        *(folder / "autoscaler").rglob("*.py"),
        folder / "_private/prometheus_exporter.py",
        folder / "_private/metrics_agent.py",
    ]
    text = "\n".join(path.read_text() for path in sources if path.exists())
    for name in {name for name in asked() if not name.startswith("ray_openseedvr_")}:
        # Counted in Ray's C++; `stage.object_store_bytes` reads it by this name.
        if name != "ray_object_store_used_memory":
            assert name.removeprefix("ray_") in text or name.removeprefix("ray_cluster_") in text, name


def test_every_panel_has_its_place_and_its_unit():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(places) == len(set(places))
    assert all(panel["title"] and (panel["type"] == "row" or panel["description"]) for panel in panels)
