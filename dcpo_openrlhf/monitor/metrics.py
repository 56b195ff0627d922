"""Every name in metrics.jsonl, with its unit and meaning."""

from collections.abc import Iterator, Sequence

from dcpo_openrlhf.monitor.causes import CAUSES

FAR = 1000
"""Steps that stand for "the trend does not lead out of the band"."""
METRICS: dict[str, str] = {
    "train/step": "rollout step, from 1",
    "rollout/reward_mean": "mean reward of the responses: what the group advantage is made of",
    "rollout/reward_std": "standard deviation of the rewards, unbiased",
    "rollout/success_rate": "share of the responses that are right (success 1): DCPO's R, and the controller's rate",
    "rollout/length_mean": "tokens of a response, mean",
    "rollout/length_max": "tokens of the longest response",
    "rollout/truncated_fraction": "share of the responses cut off at rollout.max_new_tokens",
    "rollout/age_mean": "weight versions from those that drew a response to pi_old, mean: 0 where it is pi_old's own",
    "rollout/age_max": "the same, largest; at most rollout.ahead",
    "rollout/repetition": "share of the 4-grams among a response's last 512 tokens that stand there earlier; mean",
    "rollout/no_answer_fraction": "share of the responses without an answer in the asked form",
    "rollout/form": "share of the correct responses that end by themselves and repeat at most half of their 4-grams; "
    "1 without a correct response",
    "group/distinct_answers": "different answers in a group (none counts as one), mean over groups",
    "group/all_correct": "share of the groups with correct responses alone",
    "group/all_wrong": "share of the groups without a correct response",
    "filter/drawn": "groups that the step drew: those of all rollout/, group/ and entropy/ metrics; filter/* only with "
    "train.filter",
    "filter/kept": "groups that passed train.filter and are trained on, train.prompts_per_step at most",
    "filter/surplus": "groups that passed it when the step was full already; not trained on",
    "filter/rounds": "times that the engines were asked for groups, train.filter_rounds at most",
    "filter/short": "groups still missing then, train.prompts_per_step - filter/kept: dropped ones stand in, at an "
    "advantage of 0; group/all_wrong and group/all_correct say why they were dropped, events.jsonl in words",
    "entropy/exact": "H [nats/token]: over the whole vocabulary, of pi_old at T = 1, mean over tokens",
    "entropy/sampled": "-log pi_old of the sampled tokens [nats/token], mean over tokens",
    "entropy/gap": "exact - sampled [nats/token]; near 0 where the engine samples from pi_old (rollout.ahead = 0)",
    "entropy/target": "H_0 of the step [nats/token]",
    "entropy/trend": "slope of the line through entropy/exact of the last monitor.window steps [nats/token/step]",
    "entropy/steps_to_leave": f"steps until that line leaves the target band; 0 outside it, at most {FAR}",
    "entropy/correct": "H over the tokens of correct responses [nats/token]; absent without one",
    "entropy/wrong": "H over the tokens of wrong responses [nats/token]; absent without one",
    "entropy/position_N": "H from the N-th response token to the next such N [nats/token]; absent without tokens there",
    "entropy/difficulty_N": "H on problems of difficulty N [nats/token]; only where the task names a difficulty",
    "entropy/solved_none": "H over groups without a correct response [nats/token]; absent without one",
    "entropy/solved_some": "H over groups with some correct responses [nats/token]; absent without one",
    "entropy/solved_all": "H over groups with correct responses alone [nats/token]; absent without one",
    "dcpo/temperature": "T of the target policy",
    "dcpo/alpha": "weight of the regulariser before mixing; 0 for methods without it",
    "dcpo/entropy_coefficient": "lambda of the entropy's own gradient (entropy_reg, adaptive_entropy); else 0",
    "dcpo/sample_weight": "alpha of entropic in [-1, 1], above 0 where the entropy is to fall; 0 for other methods",
    "dcpo/no_success_steps": "steps so far without any correct response: alpha was 0",
    "dcpo/regulariser_share": "mean |regulariser's part of the advantage| / mean |advantage|, over tokens trained on, "
    "those drawn from pi_old^T included; 0 for entropy_reg, adaptive_entropy and kl_cov, whose terms are no advantage",
    "dcpo/target_ratio_mean": "rho, mean over tokens; 1 in expectation",
    "dcpo/target_ratio_max": "rho, largest",
    "dcpo/target_ratio_p01": "rho, 1% quantile, to half a percent (histogram)",
    "dcpo/target_ratio_p50": "rho, median, to half a percent",
    "dcpo/target_ratio_p99": "rho, 99% quantile, to half a percent",
    "dcpo/target_ratio_ess": "(sum rho)^2 / (n sum rho^2): effective share of the tokens, in (0, 1]",
    "mismatch/prob_diff_mean": "|p_trainer - p_engine| of the sampled tokens, mean",
    "mismatch/prob_diff_max": "|p_trainer - p_engine| of the sampled tokens, largest",
    "mismatch/kl": "KL(engine || trainer) from the engine's samples [nats/token]; may be negative. With rollout.ahead "
    "these three also hold what the updates in between changed",
    "correction/outside": "share of the tokens that were masked or clipped; these three only with correction.level",
    "correction/weight_mean": "weight of the tokens, mean; 1 in expectation where nothing is outside",
    "correction/ess": "(sum w)^2 / (n sum w^2): effective share of the tokens, in (0, 1]",
    "correction/outside_age_N": "the same, of the responses that are N weight versions old; these three only with "
    "rollout.ahead",
    "correction/weight_mean_age_N": "the same",
    "correction/ess_age_N": "the same",
    "policy/kl_reference": "KL to the starting model by kl.estimator [nats/token]; only with kl.coefficient",
    "policy/loss": "loss that was minimised, mean over the step's updates (as all policy/*)",
    "policy/clip_fraction_high": "share of the tokens above 1 + loss.clip_high where that binds",
    "policy/clip_fraction_low": "share of the tokens below 1 - loss.clip_low where that binds",
    "policy/approx_kl": "log pi_old - log pi_theta of the sampled tokens [nats/token]",
    "policy/entropy": "H of pi_theta during the updates [nats/token]",
    "policy/grad_norm": "global gradient norm before clipping",
    "policy/learning_rate": "learning rate",
    "reward/timeouts": "responses so far that earned 0 since their grading ran past reward.deadline",
    "reward/crashes": "responses so far that earned 0 since their grader's process died",
    "reward/failures": "responses so far that earned 0 since a reward function raised or gave no number; events.jsonl",
    "reward/overlong_penalty": "what reward.overlong_buffer_len took off the rewards, mean; only where it is set",
    "reward/NAME": "mean of the `logs` NAME that a reward function gives, over the responses that have one",
    "weights/version": "version of the weights that the engines serve after this step",
    "monitor/window": "steps behind the trends, at most monitor.window",
    "monitor/reward_change": "rise of the line through rollout/reward_mean over the window",
    "monitor/success_change": "rise of the line through rollout/success_rate over the window",
    "monitor/form_change": "rise of the line through rollout/form over the window",
    "cost/generation_tokens_per_second": "response tokens / time/rollout (with rollout.ahead also time/generation) / "
    "engine devices",
    "cost/training_tokens_per_second": "tokens of the rows trained on, each with its prompt / (time/token_stats + "
    "time/train) / training devices",
    "cost/mfu": "FLOPs of the model for statistics and updates, a shared prompt once, / their seconds / the training "
    "devices' peak (on cpu as measured at the start, in the model's format); only with a device whose peak is known",
    "cost/engine_idle": "share of the step in which the engines do not generate",
    "cost/trainer_idle": "share of the step without token statistics or updates",
    "time/rollout": "seconds: responses and their grades; with rollout.ahead the responses are there",
    "time/generation": "seconds of the engines for the step's responses, while the step before trained; no part of "
    "time/step; only with rollout.ahead",
    "time/checkpoint": "seconds: waiting for the checkpoint of the step before",
    "time/token_stats": "seconds: forward of pi_old, advantages",
    "time/train": "seconds: updates",
    "time/weight_sync": "seconds: new weights to every engine",
    "time/wait": "seconds of time/weight_sync until the engines had drawn the next step's responses; only with "
    "rollout.ahead",
    "time/step": "seconds: all of the above",
    "time/monitor": "seconds: these statistics, not part of time/step",
    **{f"monitor/alert_{name}": f"steps so far with the alert: {cause.meaning}" for name, cause in CAUSES.items()},
}
"""Name in metrics.jsonl -> unit and meaning; N stands for a number."""


def unknown_metrics(names: Sequence[str]) -> Iterator[str]:
    """Names that METRICS does not explain."""
    for name in names:
        stem, _, number = name.rpartition("_")
        if name not in METRICS and not name.startswith("reward/") and not (number.isdigit() and f"{stem}_N" in METRICS):
            yield name
