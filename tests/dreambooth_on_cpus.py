# SPDX-License-Identifier: Apache-2.0
"""dreambooth_kron.py under accelerate's FSDP or DeepSpeed on CPUs: started by `accelerate launch`, in float64.

accelerate turns both on for GPUs only. What is left out here is that question; everything else is accelerate's own.

    accelerate launch --config_file FILE tests/dreambooth_on_cpus.py '[["--flag", "value"], ["--flag"]]'    # two runs
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dreambooth_pipelines
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from examples import dreambooth_kron
from examples.dreambooth.arguments import parse_args

if __name__ == "__main__":
    torch.set_num_threads(1)
    dreambooth_pipelines.in_float64(setattr)
    Accelerator.end_training = lambda self: None  # the processes stay together for the next run
    PartialState(cpu=True)
    for argv in json.loads(sys.argv[1]):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        args = parse_args(argv)
        dreambooth_kron.main(args)
        # a file each: on a shared pipe the lines of two processes may come out mixed, or within each other
        note = Path(args.output_dir) / f"process-{AcceleratorState().process_index}.txt"
        note.write_text(AcceleratorState().distributed_type.name)
        AcceleratorState._shared_state.clear()
    torch.distributed.destroy_process_group()
