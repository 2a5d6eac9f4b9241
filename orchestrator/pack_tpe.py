"""Proposals for a whole pack from one look at a study, by the densities of Optuna's TPE."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.sampler import _split_trials, default_gamma, default_gamma_multiobjective
from optuna.trial import TrialState

_STARTUP = 10
_CANDIDATES = 24
"""Both as in Optuna."""
_SHOWN = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


def propose_pack(
    study: optuna.Study, distributions: Mapping[str, BaseDistribution], count: int, seed: int
) -> list[dict[str, Any]]:
    """The candidates that are likelier to be good than bad by the widest margins.

    Optuna proposes one at a time: it draws 24 candidates from the density l of the good trials and takes the
    one with the highest l/g, where g is the density of all others and of those that run, and builds both
    densities anew for the next. For a pack they are built once, and the best `count` of 23 + `count`
    candidates are taken; for a pack of one that is the same. `make bench-orchestrator` compares the fronts
    that both find.

    Args:
        study: What has been tried.
        distributions: What may vary.
        count: How many.
        seed: Of the candidates.

    Returns:
        Up to `count` different proposals, parameter -> value, best first; none before ten trials have ended,
        when Optuna's are random, or where nothing can vary.
    """
    free = {name: domain for name, domain in sorted(distributions.items()) if not domain.single()}
    trials = study._get_trials(deepcopy=False, states=_SHOWN)
    ended = sum(trial.state != TrialState.RUNNING for trial in trials)
    if not free or ended < _STARTUP:
        return []
    sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True)
    gamma = default_gamma if len(study.directions) == 1 else default_gamma_multiobjective
    good, others = _split_trials(study, trials, gamma(ended))
    likely = sampler._build_parzen_estimator(study, free, good, handle_below=True)
    unlikely = sampler._build_parzen_estimator(study, free, others, handle_below=False)
    candidates = likely.sample(sampler._rng.rng, _CANDIDATES - 1 + count)
    margin = sampler._compute_acquisition_func(candidates, likely, unlikely)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for index in np.argsort(-margin, kind="stable"):
        proposal = {
            name: domain.to_external_repr(candidates[name][index].item()) for name, domain in free.items()
        }
        found.setdefault(tuple(proposal.values()), proposal)
    return list(found.values())[:count]
