"""The demo model's folder: right tokens, whole or absent, made once."""

import multiprocessing
from pathlib import Path

import pytest

from tests.bounds import HANG_S
from tools import smollm2

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def stub_convert(weights: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 1_000_000)
    (folder / "model.safetensors").chmod(0o600)  # as safetensors leaves it
    (folder / "config.json").write_text("{}")


def ensure_with_stub(barrier, target: str) -> None:
    smollm2.convert = stub_convert
    barrier.wait(timeout=HANG_S)
    assert smollm2.ensure_smollm2(target) == Path(target)


def test_second_call_makes_nothing(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(smollm2, "convert", lambda *paths: (calls.append(paths), stub_convert(*paths)))
    for _ in range(2):
        assert smollm2.ensure_smollm2(tmp_path / "cache" / "model") == tmp_path / "cache" / "model"
    assert len(calls) == 1
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["model"]
    modes = {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "cache" / "model").iterdir()}
    assert modes == {"0o644"}, "others may read it, as the folder says"


def test_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    def fail(weights, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(smollm2, "convert", fail)
    with pytest.raises(OSError, match="disk full"):
        smollm2.ensure_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_several_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    target = tmp_path / "model"
    workers = [context.Process(target=ensure_with_stub, args=(barrier, str(target))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-here")
    with pytest.raises(FileNotFoundError, match=r"no-such-package-here.*make setup"):
        smollm2.packaged_weights()


def test_default_folder_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.default_output().parent.parent == tmp_path


@pytest.mark.slow
def test_model_answers_and_stops():
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = smollm2.ensure_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
    text = "What is 12 + 345?  Two  spaces , kept."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
