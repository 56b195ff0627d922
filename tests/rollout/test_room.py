"""Prompts are counted with their tokenizer, in batches; what surely fits is not, and what is taken is counted again."""

import pytest

from dcpo_openrlhf.rollout import room
from dcpo_openrlhf.rollout.problems import Problem, Prompt, TaskError
from dcpo_openrlhf.rollout.room import Room, Texts, Writer, check_prompt_lengths
from tests.tiny import make_tokenizer


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(Problem(f"p{i}", text, "0", ""), text) for i, text in enumerate(texts)]


@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_prompt_lengths_count_the_response(batch, monkeypatch):
    monkeypatch.setattr(room, "BATCH", batch)
    tokenizer = make_tokenizer()
    texts = ["1234", "123456789", "12345678"]
    assert [len(ids) for ids in tokenizer(texts)["input_ids"]] == [4, 9, 8]
    check = {"tokenizer": tokenizer, "context": 20}
    assert check_prompt_lengths(prompts(*texts), **check, max_new_tokens=11) == 9
    with pytest.raises(TaskError, match=r"'p1' has 9 tokens, above the limit of 8 = context 20 .* 12; 1 of 3 prompts"):
        check_prompt_lengths(prompts(*texts), **check, max_new_tokens=12)
    with pytest.raises(TaskError, match=r"'p1' has 9 tokens, .* 2 of 3 prompts are too long, the longest has 9"):
        check_prompt_lengths(prompts(*texts), **check, max_new_tokens=13)


@pytest.mark.parametrize("text", ["answer", "1+1", "\u00e9" * 5, "\U0001f600", "\u0958\ufb2c", " the number is"])
def test_no_text_has_more_tokens_than_its_size(text):
    assert len(make_tokenizer()(text)["input_ids"]) <= room.size(text)


def test_a_prompt_has_no_more_bytes_than_a_writer_says():
    writer = Writer.of(lambda p: f"<user>{p.problem}</user>" if not p.messages else "".join(map(str, p.messages)))
    problem = Problem("a", "three\u00e9", "0", "")
    assert len(writer.write(problem).encode()) <= writer.most(problem)
    chat = Writer.of(
        lambda p: "".join(
            f"<{t['role']}>{t['content']}</>" for t in p.messages or [{"role": "user", "content": p.problem}]
        )
    )
    turns = [{"role": "user", "content": "12"}, {"role": "tool", "content": "34"}, {"role": "user", "content": "56"}]
    talk = Problem("a", "56", "0", "", messages=turns)
    assert len(chat.write(talk)) <= chat.most(talk) == 6 + 3 * chat.around


def test_what_surely_fits_is_seen_and_not_counted():
    counted = Room(tokenizer=None, context=10, max_new_tokens=4)
    assert counted.holds(6) and not counted.holds(7)
    counted.require()
    counted = Room(tokenizer=make_tokenizer(), context=10, max_new_tokens=4)
    assert counted.holds(5)
    counted.add(prompts("1234567")[0])
    with pytest.raises(TaskError, match="1 of 2 prompts are too long"):
        counted.require()


def test_a_text_is_written_when_it_is_taken_and_counted_then():
    written = []

    def write(problem: Problem) -> str:
        written.append(problem.id)
        return problem.problem * 3

    problems = [p.problem for p in prompts("12", "1234")]
    texts = Texts(problems, write, tokenizer=make_tokenizer(), context=10, max_new_tokens=4)
    assert len(texts) == 2 and written == []
    assert texts[0] == "121212" and written == ["p0"]
    with pytest.raises(TaskError, match="prompt 'p1' has 12 tokens, above the limit of 6"):
        texts[1]
