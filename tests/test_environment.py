"""The stamp of a run, the name of its results folder, and `environment.json`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from harness import environment

STAMP = environment.stamp("cpu", git_sha="0123abc")


@pytest.mark.parametrize(
    "gpu, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "rtx-3060-laptop-gpu"),
        ("", "cuda"),
    ],
)
def test_folder_of_a_gpu(gpu, name):
    assert environment.folder_name(replace(STAMP, device="cuda", gpu=gpu)) == name


def test_folder_of_a_processor():
    assert environment.folder_name(STAMP) == "cpu"


def test_stamp_of_a_cpu_run():
    assert (STAMP.device, STAMP.driver, STAMP.cuda, STAMP.git_sha) == ("cpu", "", "", "0123abc")
    assert STAMP.gpu and re.fullmatch(r"\d{8}T\d{6}-\d+", STAMP.run_id)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", STAMP.started_at)
    assert {"torch", "numpy"} <= {each.partition("==")[0] for each in STAMP.versions.split()}
    assert not any("\n" in str(value) for value in asdict(STAMP).values())


def test_stamp_of_a_gpu_run(monkeypatch):
    answers = {2: "NVIDIA H200, 570.1\nNVIDIA H200, 570.1", 1: "| Driver Version: 570.1   CUDA Version: 12.8 |"}
    monkeypatch.setattr(environment, "_output", lambda command: answers[min(len(command), 2)])
    stamp = environment.stamp("cuda", "sha")
    assert (stamp.gpu, stamp.driver, stamp.cuda) == ("NVIDIA H200", "570.1", "12.8")
    assert environment.find_device() == "cuda"


def test_no_driver_is_a_cpu(monkeypatch):
    monkeypatch.setattr(environment, "_output", lambda command: "")
    assert environment.find_device() == "cpu"


def test_environment_file(tmp_path):
    environment.save(tmp_path, STAMP, {"cases": ["size-d16"], "grid": Path("a/b"), "dtypes": None})
    content = json.loads((tmp_path / "environment.json").read_text())
    assert {name: content[name] for name in asdict(STAMP)} == asdict(STAMP)
    assert content["arguments"] == {"cases": ["size-d16"], "grid": "a/b"}
    assert content["python"].count(".") == 2 and content["cores"] >= 1 and content["platform"] and content["processor"]
