"""From problem to text, on any day, and the tokens that end its answer."""

import datetime
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from dcpo_openrlhf.rollout.chat import asks_for_date, check_variables, render, stop_tokens
from dcpo_openrlhf.rollout.tasks import Problem, PromptTemplate, TaskError
from tests.tiny import CHAT_TEMPLATE, PAD, TURN_END, TURN_START, make_tokenizer

PROBLEM = Problem("a", "1+1?", "2", "test")
DAY = datetime.date(2024, 7, 26)
DATED = "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}\n{% endif %}" + CHAT_TEMPLATE
THINKING = CHAT_TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<think>\n</think>{% endif %}"


def tokenizer(template: str | None = CHAT_TEMPLATE, *, eos: str = TURN_END) -> Any:
    made = make_tokenizer()
    made.chat_template, made.eos_token = template, eos
    return made


def text(tokenizer: Any, **settings: Any) -> str:
    return render(PROBLEM, tokenizer=tokenizer, template=PromptTemplate("Q: {problem}"), **settings)


def test_without_chat_a_text_begins_as_the_tokenizer_begins_it() -> None:
    made = tokenizer()
    assert text(made, chat=False) == "Q: 1+1?"
    made.bos_token = TURN_START
    assert text(made, chat=False) == "Q: 1+1?", "a BOS that the tokenizer has and does not add"
    start = made.convert_tokens_to_ids(TURN_START)
    made._tokenizer.post_processor = TemplateProcessing(f"{TURN_START} $A", special_tokens=[(TURN_START, start)])
    assert text(made, chat=False) == f"{TURN_START}Q: 1+1?"
    assert made(text(made, chat=False), add_special_tokens=False)["input_ids"] == made("Q: 1+1?")["input_ids"]


def test_chat_messages_stay_as_they_are() -> None:
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "1+1?"}]
    problem = Problem("a", "1+1?", "2", "test", messages=turns)
    how: Any = {"tokenizer": tokenizer(), "template": PromptTemplate("Q: {problem}")}
    assert render(problem, **how) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(TaskError, match=r"problem 'a' is chat messages, which take no task\.system = 'T'"):
        render(problem, **how, system="T")
    with pytest.raises(TaskError, match=r"problem 'a' is chat messages, which take no task\.chat = false"):
        render(problem, **how, chat=False)


def test_variables_reach_the_chat_template() -> None:
    made = tokenizer(THINKING)
    assert text(made, variables={"enable_thinking": False}) == text(made) + "<think>\n</think>"
    check_variables(made, {"enable_thinking": False})
    with pytest.raises(TaskError, match="sets enable_thinkin, which the tokenizer's chat template does not read"):
        check_variables(made, {"enable_thinkin": False})
    with pytest.raises(TaskError, match="may not set tokenize"):
        check_variables(made, {"tokenize": True})
    with pytest.raises(TaskError, match=r"chat_template_kwargs = \{'enable_thinking': False\} needs task.chat = true"):
        text(made, variables={"enable_thinking": False}, chat=False)


def test_the_date_is_the_one_given() -> None:
    made = tokenizer(DATED)
    assert text(made, date=DAY).startswith("Today: 26 Jul 2024\n<|im_start|>user")
    assert text(made, date=datetime.date(1999, 1, 2)).startswith("Today: 02 Jan 1999\n")
    assert asks_for_date(made, system=None) and asks_for_date(made, system="S")
    assert not asks_for_date(tokenizer(), system=None)
    fixed = tokenizer("{% if date_string is not defined %}" + DATED + "{% endif %}")
    assert not asks_for_date(fixed, system=None, variables={"date_string": "1 Jan"})


def test_a_response_ends_at_eos_end_of_turn_and_what_the_recipe_adds() -> None:
    made = tokenizer(eos=PAD)  # as Qwen2.5's base models
    pad, start, end = made.convert_tokens_to_ids([PAD, TURN_START, TURN_END])
    made.add_special_tokens({"additional_special_tokens": [TURN_END]})
    assert stop_tokens(made, chat=True) == [pad, end]
    assert stop_tokens(made, chat=False) == [pad]
    assert stop_tokens(tokenizer(), chat=True) == [end]
    assert stop_tokens(made, chat=True, stop=[TURN_START, PAD]) == [pad, end, start]
    with pytest.raises(TaskError, match=r"rollout.stop: '</zz>' is 5 tokens .*; each text must be one token"):
        stop_tokens(made, chat=True, stop=["</zz>"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] }} {{ messages[-1]['content'] }}",
        "{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}",
    ],
)
def test_a_template_without_an_end_of_turn(template: str) -> None:
    made = tokenizer(template, eos=PAD)
    assert stop_tokens(made, chat=True) == [made.eos_token_id]


@pytest.mark.parametrize("template", ["{{ raise_exception('needs a system turn') }}", "{{ messages[7]['role'] + 1 }}"])
def test_a_template_that_fails_is_one_error(template: str) -> None:
    with pytest.raises(TaskError, match=r"the chat template of .* fails on a turn of user \(.*; set task.system or"):
        text(tokenizer(template))
