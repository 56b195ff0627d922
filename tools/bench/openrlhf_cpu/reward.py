"""The reward of the recipe's side, as a file for OpenRLHF's --reward.remote_url: is the last integer the answer?"""

from dcpo_openrlhf.reward.extract import last_integer
from tools.smollm2 import END_OF_TURN


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, float]:
    """OpenRLHF asks for one response at a time: its text after the prompt, and the answer."""
    response = queries[0][len(prompts[0]) :].removesuffix(END_OF_TURN)
    return {"rewards": float(last_integer(response) == labels[0])}
