"""From a problem to the text that the policy reads, and the tokens that end its answer.

A tokenizer is any object with Hugging Face's `apply_chat_template` and `__call__`; nothing here imports torch or ray.
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dcpo_openrlhf.rollout.tasks import Problem, PromptTemplate, TaskError

RESERVED = (
    "messages",
    "conversation",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "strftime_now",
)
"""Variables of a chat template that are not the recipe's to set."""
_ANSWER = "ANSWER"


def render(
    problem: Problem,
    *,
    tokenizer: Any,
    template: PromptTemplate,
    system: str | None = None,
    chat: bool = True,
    variables: Mapping[str, Any] | None = None,
    date: datetime.date | None = None,
) -> str:
    """The prompt text: the filled template, as one user turn of the tokenizer's chat template unless `chat` is False.

    A problem's own chat messages stand for that turn, and take neither `template` nor `system`. With `system` None the
    chat template's own default applies; `variables` are further ones of the template, and `date` is the day that it
    reads as today (None: the clock's). The text holds every special token that it needs, BOS too
    where the tokenizer begins every text with it: tokenize it with add_special_tokens=False. Raises TaskError where a
    chat template is needed and there is none, or it fails.
    """
    if problem.messages:
        if not chat or system is not None:
            wrong = "task.chat = false" if not chat else f"task.system = {system!r}"
            raise TaskError(f"problem {problem.id!r} is chat messages, which take no {wrong}; drop it")
        turns = [dict(turn) for turn in problem.messages]
        return _apply(tokenizer, turns, variables=variables, date=date, add_generation_prompt=True)
    user = template.fill(problem.problem)
    if not chat:
        if system is not None:
            raise TaskError(f"a system message needs a chat template: remove it or set chat to true; it is {system!r}")
        if variables:
            raise TaskError(f"task.chat_template_kwargs = {dict(variables)} needs task.chat = true; remove one of them")
        return _bos(tokenizer) + user
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": user})
    return _apply(tokenizer, messages, variables=variables, date=date, add_generation_prompt=True)


def check_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """Raise TaskError for a variable that the chat template does not read: it would change nothing, in silence."""
    source = tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else ""
    for name in variables:
        if name in RESERVED:
            raise TaskError(f"task.chat_template_kwargs may not set {name}, which is set for it; remove it")
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise TaskError(
                f"task.chat_template_kwargs sets {name}, which the tokenizer's chat template does not read; remove it "
                "or look for its name there"
            )


def asks_for_date(tokenizer: Any, *, system: str | None, variables: Mapping[str, Any] | None = None) -> bool:
    """Does the text of a prompt depend on the day that it is rendered?"""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": "1+1?"})
    days = (datetime.date(2001, 2, 3), datetime.date(2014, 5, 16))
    one, other = (_apply(tokenizer, messages, variables=variables, date=d, add_generation_prompt=True) for d in days)
    return one != other


def stop_tokens(tokenizer: Any, *, chat: bool, stop: Sequence[str] = ()) -> list[int]:
    """Tokens that end a response: EOS, the special token that ends a turn of the chat template, and those of `stop`.

    Base models with a chat template have another EOS than the end of its turns, and would go on after their answer.
    Raises TaskError for a text of `stop` that is not one token: engines see tokens alone.
    """
    found = [tokenizer.eos_token_id]
    if chat and (end := _end_of_turn(tokenizer)) is not None:
        found.append(end)
    for text in stop:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise TaskError(
                f"rollout.stop: {text!r} is {len(ids)} tokens of this tokenizer ({ids}); each text must be one token, "
                "such as an end of turn"
            )
        found += ids
    return list(dict.fromkeys(found))


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token right after the assistant's answer; None where the template writes none there."""
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = _apply(tokenizer, messages, date=datetime.date(2001, 2, 3), add_generation_prompt=False)
    except TaskError:  # a template that takes no answers; it has rendered the prompts
        return None
    rest = text.rpartition(_ANSWER)[2].lstrip()
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if _ANSWER in text and rest else []
    special = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    return ids[0] if ids and ids[0] in special | set(tokenizer.all_special_ids) else None


def _bos(tokenizer: Any) -> str:
    """The BOS token where the tokenizer itself begins a text with it, else nothing."""
    ids = tokenizer("1")["input_ids"]
    return tokenizer.bos_token if ids and ids[0] == getattr(tokenizer, "bos_token_id", None) else ""


def _apply(
    tokenizer: Any,
    messages: list[dict[str, str]],
    *,
    variables: Mapping[str, Any] | None = None,
    date: datetime.date | None,
    add_generation_prompt: bool,
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "?")
        raise TaskError(f"the tokenizer of {name} has no chat template; set chat to false or use a chat model")
    given = dict(variables or {})
    if date is not None:  # a variable goes before transformers' function of this name, which asks the clock
        given["strftime_now"] = datetime.datetime.combine(date, datetime.time()).strftime
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **given
        )
    except Exception as error:  # jinja's, what the template itself raises, and Python's of any kind inside it
        roles = " and ".join(message["role"] for message in messages)
        raise TaskError(
            f"the chat template of {getattr(tokenizer, 'name_or_path', '?')} fails on a turn of {roles} "
            f"({type(error).__name__}: {error}); set task.system or task.chat_template_kwargs to what it takes, or "
            "task.chat=false"
        ) from error
