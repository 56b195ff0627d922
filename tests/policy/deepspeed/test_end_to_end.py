"""The whole path on DeepSpeed: two steps of a tiny model on two ranks, a real vLLM engine, sync, checkpoint, export."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.test_end_to_end import METRICS, Run, trace
from tests.tiny import make_biased_model


@pytest.mark.long  # 70 s
def test_two_steps_with_an_engine(tmp_path: Path) -> None:
    model = make_biased_model(tmp_path / "model")
    backend = ["parallel.backend=deepspeed", "parallel.zero_stage=3", "parallel.tensor=1"]
    run = Run(
        tmp_path / "run", model, *backend, "train.micro_batch_tokens=600", "checkpoint.every=1", "run.profile=[2]"
    )
    assert run.wait() == 0, run.log.read_text()[-5000:]
    metrics = run.metrics()
    assert [m["step"] for m in metrics] == [1, 2]
    for m in metrics:
        assert set(METRICS) <= set(m)
        assert m["mismatch/prob_diff_mean"] < 1e-4  # fp32 on both sides: the engine has the trainer's weights
        assert m["policy/grad_norm"] > 0 and 0 < m["rollout/reward_mean"] < 1
    assert [m["weights/version"] for m in metrics] == [2, 3]
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run.folder / "hf", dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    files = {path.name for path in (run.folder / "checkpoints/step_000002/deepspeed").iterdir()}
    assert {"zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"} <= files
    traces = {path.name: trace(path) for path in (run.folder / "profile").iterdir()}
    assert traces.keys() == {"step_000002_driver.json", "step_000002_policy_stage0.json"}
    assert {"update", "aten::mm"} <= traces["step_000002_policy_stage0.json"]
    assert {"statistics", "update", "sync", "save"} <= run.phases(2, "policy 1")
    assert run.alive() == []
