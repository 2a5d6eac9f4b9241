"""Proposals for a pack: Optuna's own for a pack of one, and the best candidates of all for larger ones."""

from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.trial import TrialState, create_trial

from orchestrator.pack_tpe import propose_pack

SPACE: dict[str, BaseDistribution] = {
    "dose": FloatDistribution(-2.0, 2.0),
    "rate": FloatDistribution(1e-4, 1.0, log=True),
    "layer": IntDistribution(0, 20),
    "tokens": CategoricalDistribution(["all", "last"]),
}


def study_of(trials: int, *, objectives: int = 2, seed: int = 0) -> optuna.Study:
    """A study of random trials: most complete, some pruned with a constraint, failed, or running."""
    study = optuna.create_study(directions=["maximize", "minimize"][:objectives])
    random = np.random.default_rng(seed)
    for number in range(trials):
        params = {
            "dose": random.uniform(-2, 2),
            "rate": 10 ** random.uniform(-4, 0),
            "layer": int(random.integers(21)),
            "tokens": str(random.choice(["all", "last"])),
        }
        state = {5: TrialState.PRUNED, 6: TrialState.FAIL, 7: TrialState.RUNNING}.get(
            number % 8, TrialState.COMPLETE
        )
        values = [-abs(params["dose"] - 1), abs(params["layer"] - 7) + np.log(params["rate"])][:objectives]
        study.add_trial(
            create_trial(
                state=state,
                params=params,
                distributions=SPACE,
                values=values if state == TrialState.COMPLETE else None,
                constraints={"infeasible": 1.0} if state == TrialState.PRUNED else None,
            )
        )
    return study


@pytest.mark.parametrize("trials", [16, 60, 300])
@pytest.mark.parametrize("objectives", [1, 2])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_pack_of_one_is_what_optuna_proposes(trials: int, objectives: int) -> None:
    study = study_of(trials, objectives=objectives)
    for seed in range(5):
        [ours] = propose_pack(study, SPACE, 1, seed)
        study.sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True)
        theirs = study.ask(SPACE)
        assert ours == theirs.params
        study.tell(theirs, state=TrialState.FAIL)


def test_a_pack_has_different_proposals_inside_the_space_and_starts_with_the_best() -> None:
    study = study_of(60)
    pack = propose_pack(study, SPACE, 16, seed=3)
    assert len({tuple(proposal.items()) for proposal in pack}) == 16
    for proposal in pack:
        assert proposal.keys() == SPACE.keys()
        assert all(SPACE[name]._contains(SPACE[name].to_internal_repr(proposal[name])) for name in SPACE)
    assert pack == propose_pack(study, SPACE, 16, seed=3)
    assert pack != propose_pack(study, SPACE, 16, seed=4)


def test_proposals_gather_where_trials_were_good() -> None:
    pack = propose_pack(study_of(300, objectives=1), SPACE, 16, seed=0)
    uniform = np.random.default_rng(0).uniform(-2, 2, size=10_000)
    assert np.median([abs(each["dose"] - 1) for each in pack]) < 0.3 * np.median(abs(uniform - 1))


def test_what_runs_is_kept_away_from() -> None:
    study = study_of(60)
    before = propose_pack(study, SPACE, 24, seed=0)
    for _ in range(30):
        study.add_trial(create_trial(state=TrialState.RUNNING, params=before[0], distributions=SPACE))
    after = propose_pack(study, SPACE, 24, seed=0)
    assert before[0] not in after[:6]
    assert any(proposal in before for proposal in after), "it is drawn from the same candidates"


def test_a_space_with_few_configurations_gives_each_once() -> None:
    space: dict[str, BaseDistribution] = {"tokens": SPACE["tokens"], "layer": IntDistribution(3, 3)}
    study = optuna.create_study(directions=["maximize"])
    for number in range(12):
        params = {"tokens": ["all", "last"][number % 2], "layer": 3}
        study.add_trial(create_trial(params=params, distributions=space, values=[float(number % 2)]))
    pack: list[dict[str, Any]] = propose_pack(study, space, 16, seed=0)
    assert sorted(each["tokens"] for each in pack) == ["all", "last"]
    assert all(each.keys() == {"tokens"} for each in pack)
    assert propose_pack(study, {"layer": space["layer"]}, 4, seed=0) == []


def test_before_ten_have_ended_it_has_none() -> None:
    assert propose_pack(study_of(11), SPACE, 4, seed=0) == []  # a running and a failed one do not count
    assert len(propose_pack(study_of(13), SPACE, 4, seed=0)) == 4
