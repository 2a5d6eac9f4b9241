"""The same trials in Ray Tune with OptunaSearch. Prints the seconds from the first start to the last end."""

import argparse
import os
import time
from typing import Any

import ray
from optuna.samplers import TPESampler
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from benchmarks.nothing import Params, values


class Stopwatch(tune.Callback):
    """When the first trial began and the last one ended, by this process's clock."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.ended = 0.0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """As Ray Tune says."""
        self.began = time.perf_counter() if self.began is None else self.began

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """As Ray Tune says."""
        self.ended = time.perf_counter()


def _nothing(config: dict[str, float]) -> None:
    tune.report(values(Params(**config)))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ray_tune", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("trials", type=int)
    parser.add_argument("--reuse", action="store_true", help="keep actors from trial to trial")
    options = parser.parse_args()
    os.environ["RAY_TRAIN_ENABLE_V2"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    watch = Stopwatch()
    search = OptunaSearch(
        metric=["up", "down"],
        mode=["max", "min"],
        sampler=TPESampler(seed=0, multivariate=True, constant_liar=True),
    )
    tuner = tune.Tuner(
        tune.with_resources(_nothing, {"cpu": 1}),
        param_space={name: tune.uniform(0.0, 1.0) for name in "abcde"},
        tune_config=tune.TuneConfig(
            search_alg=search, num_samples=options.trials, reuse_actors=options.reuse
        ),
        run_config=tune.RunConfig(storage_path=options.folder, name="tune", callbacks=[watch], verbose=0),
    )
    found = tuner.fit()
    assert len(found) == options.trials
    assert not found.errors
    assert watch.began is not None
    print(watch.ended - watch.began)


if __name__ == "__main__":
    main()
