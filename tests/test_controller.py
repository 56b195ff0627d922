from __future__ import annotations

import math
import random

import pytest

from dcpo_openrlhf.controller import EntropyController, SampleWeight, SteppedCoefficient, Target

VOCABULARY = 64


def make(**changes) -> EntropyController:
    return EntropyController(
        **{"target_entropy": 1.8, "temperature_low": 0.8, "temperature_high": 1.2, "alpha_max": 0.1, **changes}
    )


# ---- schedules and rules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entropy", "expected"), [(1.79, 1.2), (1.8, 0.8), (1.81, 0.8), (0.0, 1.2)])
def test_switch_rule(entropy, expected):
    assert make().temperature(entropy) == expected


@pytest.mark.parametrize(("entropy", "expected"), [(1.8, 1.0), (1.7, 1.1), (1.9, 0.9), (0.0, 1.2), (4.0, 0.8)])
def test_continuous_rule(entropy, expected):
    assert make(temperature_rule="continuous").temperature(entropy) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "entropy", "success_rate", "expected"),
    [
        ("reference", 1.75, 0.5, 0.05 / 0.5),
        ("reference", 1.85, 0.5, 0.05 / 0.5),
        ("reference", 0.3, 0.25, 0.1 / 0.25),
        ("paper", 0.3, 0.5, 0.1 * 1.5 / 0.5),
        ("paper", 3.3, 0.5, 0.1 * 1.5 / 0.5),
        ("constant", 0.3, 0.5, 0.1),
        ("constant", 3.3, 1.0, 0.1),
        ("pi", 0.3, 0.5, 0.1 / 0.5),
    ],
)
def test_alpha(schedule, entropy, success_rate, expected):
    assert make(alpha_schedule=schedule).alpha(entropy, success_rate) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["reference", "paper", "constant", "pi"])
def test_alpha_is_never_negative(schedule):
    controller = make(alpha_schedule=schedule)
    rng = random.Random(0)
    for _ in range(300):
        h, success_rate = rng.uniform(0.0, 4.0), rng.uniform(0.01, 1.0)
        assert controller.step(h, h, success_rate).alpha >= 0.0


@pytest.mark.parametrize("schedule", ["reference", "paper", "constant", "pi"])
def test_no_correct_answer_gives_alpha_zero_and_is_counted(schedule):
    controller = make(alpha_schedule=schedule)
    assert controller.alpha(0.5, 0.0) == 0.0
    assert controller.step(1.75, 1.75, 0.0).alpha == 0.0
    assert controller.no_success_count == 2 and controller.integral == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_leave_the_state(bad):
    controller = make(alpha_schedule="pi")
    controller.step(1.7, 1.6, 0.5)
    before = controller.state_dict()
    for call in (
        lambda: controller.temperature(bad),
        lambda: controller.alpha(bad, 0.5),
        lambda: controller.alpha(1.0, bad),
        lambda: controller.step(bad, 1.0, 0.5),
        lambda: controller.step(1.0, bad, 0.5),
        lambda: controller.step(1.0, 1.0, bad),
    ):
        with pytest.raises(ValueError, match=str(bad)):
            call()
    assert controller.state_dict() == before


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_success_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match=r"\[0, 1\], got"):
        make().alpha(1.0, rate)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_entropy": -0.1}, "target_entropy must be finite and >= 0, got -0.1"),
        ({"target_entropy": float("nan")}, "target_entropy must be finite"),
        ({"alpha_max": -1.0}, "alpha_max must be finite and >= 0, got -1.0"),
        ({"temperature_low": 1.1}, "temperature_low = 1.1"),
        ({"temperature_high": 0.9}, "temperature_high = 0.9"),
        ({"temperature_low": 0.0}, "temperature_low = 0.0"),
        ({"alpha_schedule": "pi", "temperature_rule": "continuous"}, "'pi' needs temperature_rule 'switch'"),
        (
            {"target_entropy": Target(start=1.0, end=-1.0, course="linear")},
            "target_entropy_end must be finite and >= 0",
        ),
        ({"alpha_schedule": "pi", "integral_gain": float("inf")}, "integral_gain must be finite"),
    ],
)
def test_settings_are_validated(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_lagged_sampled_is_the_previous_sampled_entropy_and_starts_at_zero():
    controller = make(entropy_source="lagged_sampled")
    assert controller.step(3.0, 2.5, 1.0).entropy == 0.0
    second = controller.step(3.0, 1.0, 1.0)
    assert second.entropy == 2.5 and second.temperature == 0.8
    assert make().step(3.0, 2.5, 1.0).entropy == 3.0


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_schedule": "pi"},
        {"entropy_source": "lagged_sampled"},
        {"target_entropy": Target(start=2.0, end=1.6, course="cosine", steps=20)},
    ],
)
def test_state_continues_to_the_bit(settings):
    rng = random.Random(1)
    inputs = [(rng.uniform(1.6, 2.0), rng.uniform(1.6, 2.0), rng.choice([0.0, 0.5])) for _ in range(20)]
    whole, first, second = make(**settings), make(**settings), make(**settings)
    expected = [whole.step(*x) for x in inputs]
    got = [first.step(*x) for x in inputs[:9]]
    second.load_state_dict(first.state_dict())
    got += [second.step(*x) for x in inputs[9:]]
    assert got == expected and second.state_dict() == whole.state_dict() and whole.no_success_count > 0
    assert len({d.entropy_coefficient for d in got}) > 3 and len({d.sample_weight for d in got}) > 15


@pytest.mark.parametrize("key", ["integral", "steps_done", "coefficient", "error_sum"])
def test_a_foreign_state_is_refused(key):
    state = make().state_dict()
    state.pop(key)
    with pytest.raises(ValueError, match=key):
        make().load_state_dict(state)


# ---- the course of H_0, and what other methods make of the entropy --------------------------------------------------


@pytest.mark.parametrize(
    ("course", "expected"),
    [("constant", [2.0] * 5), ("linear", [2.0, 1.75, 1.5, 1.25, 1.0]), ("cosine", [2.0, 1.854, 1.5, 1.146, 1.0])],
)
def test_the_target_goes_from_its_start_to_its_end_over_the_run(course, expected):
    target = Target(start=2.0, end=1.0, course=course, steps=5)
    assert [target.at(step) for step in range(1, 6)] == pytest.approx(expected, abs=5e-4)
    assert target.at(9) == target.at(5) and Target(start=2.0, end=1.0, course=course, steps=1).at(1) == 2.0


def test_the_controller_follows_the_target():
    controller = make(
        target_entropy=Target(start=2.0, end=1.0, course="linear", steps=3), temperature_rule="continuous"
    )
    decisions = [controller.step(1.5, 1.5, 1.0) for _ in range(4)]
    assert [d.target_entropy for d in decisions] == [2.0, 1.5, 1.0, 1.0]
    assert [d.temperature for d in decisions] == [1.2, 1.0, 0.8, 0.8]


def test_the_stepped_coefficient_rises_below_the_target_and_is_unused_above_it():
    c = SteppedCoefficient(change=0.25, largest=0.6)
    assert [c.step(0.1) for _ in range(4)] == [0.0, 0.25, 0.5, 0.6]  # of Skywork-OR1: starts at 0, bounded
    assert c.step(-0.1) == 0.0 and c.value == pytest.approx(0.35)
    assert c.step(0.0) == 0.0 and c.value == pytest.approx(0.1)
    assert [c.step(-1.0), c.value] == [0.0, 0.0]
    assert c.step(1.0) == 0.0 and c.value == 0.25


def test_the_sample_weight_is_pi_control_of_the_excess_entropy():
    w = SampleWeight(proportional=0.5, integral=0.1)
    assert w.step(-1.0) == 0.5  # H above H_0: the entropy is to fall; the sum of earlier steps is empty
    assert w.step(-1.0) == pytest.approx(0.6)
    assert w.step(0.5) == pytest.approx(-0.25 + 0.2)
    assert w.step(9.0) == -1.0 and w.error_sum == pytest.approx(-7.5)


# ---- closed loop: tabular softmax, R = 1, expected step alpha (pi^T - pi) in logits ---------------------------------


def softmax(z: list[float], temperature: float = 1.0) -> list[float]:
    top = max(z)
    e = [math.exp((x - top) / temperature) for x in z]
    total = sum(e)
    return [x / total for x in e]


def entropy_of(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0.0)


def closed_loop(decide, *, spread: float, steps: int, eta: float = 3.0, drift: float = 0.0) -> list[float]:
    """Entropy at each step; decide(H) -> (T, alpha); drift pi (log pi + H) sharpens as a policy gradient does."""
    rng = random.Random(0)
    z = [spread * rng.gauss(0.0, 1.0) for _ in range(VOCABULARY)]
    history = []
    for _ in range(steps):
        p = softmax(z)
        h = entropy_of(p)
        history.append(h)
        temperature, alpha = decide(h)
        target = softmax(z, temperature)
        z = [x + eta * (alpha * (q - a) + drift * a * (math.log(a) + h)) for x, q, a in zip(z, target, p, strict=True)]
    return history


def with_controller(**changes):
    controller = make(**changes)
    return lambda h: controller.step(h, h, 1.0)[1:3]


ABOVE, BELOW = 0.3, 6.0  # spread of the first logits: H about 4.1 and 0.8


@pytest.mark.parametrize("schedule", ["reference", "pi"])
@pytest.mark.parametrize("spread", [ABOVE, BELOW])
def test_closed_loop_settles_at_the_target(schedule, spread):
    history = closed_loop(with_controller(alpha_schedule=schedule), spread=spread, steps=2000, eta=5.0)
    assert abs(history[0] - 1.8) > 0.9
    assert max(abs(h - 1.8) for h in history[-100:]) < 0.005


@pytest.mark.parametrize("spread", [ABOVE, BELOW])
def test_pi_has_no_steady_state_error_where_the_others_have_one(spread):
    """Against a constant sharpening drift: the others settle below H_0, pi at H_0, and overshoots by 2% at most."""

    def run(schedule: str) -> tuple[float, float]:
        loop = closed_loop(with_controller(alpha_schedule=schedule), spread=spread, steps=2500, drift=0.01)
        inside = loop[next(i for i, h in enumerate(loop) if abs(h - 1.8) < 0.2) :] if schedule != "paper" else loop
        overshoot = 1.8 - min(inside) if spread == ABOVE else max(inside) - 1.8
        return sum(loop[-100:]) / 100 - 1.8, overshoot

    reference_error, reference_overshoot = run("reference")
    paper_error, _ = run("paper")
    pi_error, pi_overshoot = run("pi")
    assert paper_error < -0.3 and reference_error < -0.03
    assert abs(pi_error) < 0.005
    assert pi_overshoot < 0.02 * 1.8 and pi_overshoot < max(reference_overshoot, 0.0) + 0.005 * 1.8


@pytest.mark.parametrize("spread", [ABOVE, BELOW])
def test_pi_does_not_overshoot_without_a_drift(spread):
    loop = closed_loop(with_controller(alpha_schedule="pi"), spread=spread, steps=2500)
    overshoot = 1.8 - min(loop) if spread == ABOVE else max(loop) - 1.8
    assert overshoot < 0.01 * 1.8 and abs(sum(loop[-100:]) / 100 - 1.8) < 0.001


def test_anti_windup_forgets_a_long_saturation():
    """An integral that kept growing while the drive was saturated would hold T_high long after H passed H_0."""
    controller = make(alpha_schedule="pi")
    for _ in range(1000):
        controller.step(0.2, 0.2, 1.0)
    assert controller.integral == 0.0
    assert controller.temperature(1.85) == 0.8


def test_signed_alpha_runs_away():
    """alpha = 0.1 (H_0 - H) together with the switching T is a double negation: positive feedback."""
    controller = make()

    def signed(h: float) -> tuple[float, float]:
        return controller.temperature(h), 0.1 * (1.8 - h)

    def absolute(h: float) -> tuple[float, float]:
        return controller.temperature(h), controller.alpha(h, 1.0)

    start = {"spread": 1.5, "steps": 2000, "eta": 5.0}
    assert 2.8 < closed_loop(signed, **start)[0] < 3.4
    assert closed_loop(signed, **start)[-1] > 0.99 * math.log(VOCABULARY)
    assert closed_loop(absolute, **start)[-1] == pytest.approx(1.8, abs=0.005)
