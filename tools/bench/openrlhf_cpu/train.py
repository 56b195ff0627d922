"""OpenRLHF's own train_ppo_ray with this command line, on a Ray of this process alone.

OpenRLHF joins a Ray that is there, and would start one with this machine's GPUs, of which a CPU machine has none.
"""

import runpy

import ray

from dcpo_openrlhf import local_ray


def main() -> None:
    # an engine, a policy rank, and one CPU more, which the trainer's actor takes while it starts
    local_ray.start(num_cpus=3, num_gpus=2, include_dashboard=False)
    try:
        runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
