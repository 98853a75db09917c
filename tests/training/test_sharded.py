"""Sharded training on two CPU processes: all gather, one writes, and the result is that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from support.training import ROOT, SIZE, Make

from faithdiff_core.training.config import StageConfig
from faithdiff_core.training.start import train

PROGRAM = """
import faulthandler, json, sys
from pathlib import Path
import torch
from accelerate import state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

faulthandler.dump_traceback_later(400, exit=True)
torch.set_num_threads(1)
made = state.AcceleratorState.__init__

def sharded(self, *arguments, **options):
    # accelerate makes FSDP for accelerators alone; with gloo it runs on CPUs as well.
    made(self, *arguments, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.__dict__["distributed_type"] = DistributedType.FSDP
        self.__dict__["device"] = state.PartialState._shared_state["device"] = torch.device("cpu")
        self.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=int(sys.argv[3]), auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["ResnetBlock2D", "BasicTransformerBlock"], use_orig_params=True,
            sync_module_states=False, cpu_ram_efficient_loading=False, state_dict_type="FULL_STATE_DICT",
        )

state.AcceleratorState.__init__ = sharded
from faithdiff_core.cli.train import read_config
from faithdiff_core.training.start import train
result = train(read_config(Path(sys.argv[1])))
if result.files:
    Path(sys.argv[2]).write_text(json.dumps(result.losses))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_writes_what_one_process_writes(make: Make, images: Path, tmp_path: Path, version: int) -> None:
    stages = (StageConfig(1, 2, 1e-4, 1e-4, 0), StageConfig(2, 2, 1e-4, 1e-4, 0))
    one = train(make(stages=stages, batch=4, ema=0.0))
    rates = {"learning_rate": 1e-4, "lq_learning_rate": 1e-4, "warmup": 0}
    values: dict[str, Any] = {
        "base": str(make().base),
        "output": str(tmp_path / "two"),
        "data": {"folder": str(make().data.folder), "size": SIZE, "degradation": {"scale": 2}},
        "stages": [{"stage": number, "steps": 2, **rates} for number in (1, 2)],
        "validation": {"folder": str(images), "every": 2, "count": 1, "steps": 2},
        "batch": 2,
        "workers": 0,
        "ema": 0.0,
        "save_precision": "fp32",
        "tensorboard": False,
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "run.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(tmp_path / "run.py"), str(tmp_path / "two.yaml"), str(tmp_path / "losses.json"), str(version)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = json.loads((tmp_path / "losses.json").read_text())
    assert two == pytest.approx(one.losses, rel=1e-3)
    for file in one.files:
        apart, together = load_file(tmp_path / "two" / file.name), load_file(file)
        assert apart.keys() == together.keys()
        # Adam's first steps have the learning rate's size whatever the gradient's, so tiny differences can turn a sign.
        assert max(float((together[key] - apart[key]).abs().max()) for key in together) < 1e-3
    assert list((tmp_path / "two" / "samples").iterdir())
