"""Specs and their ids, parameters and their checks, the contract of job modules, code versions."""

import dataclasses
import importlib.metadata
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import steer
from jobs.errors import SpecError
from jobs.resolve import code_version, data_hash, load_job, locate_data, make_params, make_spec
from jobs.spec import ModelRef, Requirement, Spec, canonical_json, content_hash, is_defined, params_to_json

ROOT = Path(__file__).parents[1]
JOBS = (
    *("jobs.adapters", "jobs.anomaly", "jobs.calibrate", "jobs.capability", "jobs.capture", "jobs.classify"),
    *("jobs.dct", "jobs.extract", "jobs.finetune", "jobs.generate", "jobs.honesty", "jobs.judge"),
    *("jobs.melbo", "jobs.naming", "jobs.prompt_search", "jobs.radius_scan", "jobs.sample"),
    *("jobs.stability", "jobs.steer", "jobs.tune"),
)
DIRECTED = {
    *("jobs.capability", "jobs.capture", "jobs.extract", "jobs.generate", "jobs.honesty", "jobs.judge"),
    *("jobs.steer", "jobs.tune"),
}
"""All that take a direction, or make one."""
LEARNED = {
    *("jobs.anomaly", "jobs.calibrate", "jobs.dct", "jobs.melbo", "jobs.prompt_search", "jobs.radius_scan"),
    *("jobs.naming", "jobs.stability"),
}
"""All that take learned vectors, or make some."""
STEERED = ("jobs.capability", "jobs.generate", "jobs.honesty", "jobs.steer")
REQUIRED: dict[str, dict[str, Any]] = {
    **{job: {"layer": 1, "dose": 0.5} for job in STEERED},
    "jobs.classify": {"replies": "courtesy_replies"},
    "jobs.judge": {
        **{"layer": 1, "dose": 0.5, "judge": "small", "question": "Which text is kinder?"},
        "address": "http://127.0.0.1:8000/v1",
    },
}
REQUIRED["jobs.naming"] = {"judge": "small", "address": REQUIRED["jobs.judge"]["address"]}
MODEL = ModelRef(id="some/model", revision="0123abc")

plain = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
jsons = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
specs = st.builds(
    Spec,
    job=st.text(),
    code=st.text(),
    params=st.dictionaries(st.text(), jsons, max_size=4),
    model=st.builds(ModelRef, id=st.text(), revision=st.none() | st.text(), trust_remote_code=st.booleans()),
    data=st.dictionaries(st.text(), st.text(), max_size=3),
    seed=st.integers(),
)


def reordered(value: Any) -> Any:
    """The same JSON value with the keys of every dictionary the other way round."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def defaults(job: str) -> Any:
    return make_params(job, REQUIRED.get(job, {}))


class TestSpecIds:
    @given(specs)
    def test_the_order_of_keys_does_not_matter(self, spec: Spec) -> None:
        other = dataclasses.replace(
            spec, params=reordered(dict(spec.params)), data=reordered(dict(spec.data))
        )
        assert other.id == spec.id
        assert canonical_json(reordered(spec.to_json())) == canonical_json(spec.to_json())

    @given(specs)
    def test_a_spec_survives_json_with_its_id(self, spec: Spec) -> None:
        again = Spec.from_json(json.loads(json.dumps(reordered(spec.to_json()))))
        assert again == spec
        assert again.id == spec.id

    @pytest.mark.parametrize(
        "change",
        [
            {"job": "jobs.other"},
            {"code": "1" * 16},
            {"params": {"layer": 2}},
            {"model": dataclasses.replace(MODEL, revision=None)},
            {"model": dataclasses.replace(MODEL, dtype="bfloat16")},
            {"model": dataclasses.replace(MODEL, weights="0" * 64)},
            {"data": {"pairs": "f" * 16}},
            {"seed": 1},
        ],
    )
    def test_whatever_decides_a_result_changes_the_id(self, change: dict[str, Any]) -> None:
        spec = Spec(
            job="jobs.steer", code="0" * 16, params={"layer": 1}, model=MODEL, data={"pairs": "0"}, seed=0
        )
        assert dataclasses.replace(spec, **change).id != spec.id

    @given(jsons, jsons)
    def test_different_values_have_different_hashes(self, first: Any, second: Any) -> None:
        same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
        assert (content_hash(first) == content_hash(second)) == same

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_value_that_json_cannot_carry_is_refused(self, value: float) -> None:
        with pytest.raises(ValueError, match="JSON"):
            canonical_json({"dose": value})

    def test_a_metric_is_defined_only_if_finite(self) -> None:
        values = (0.0, -1.5, None, math.nan, math.inf, -math.inf)
        assert [is_defined(value) for value in values] == [True, True, False, False, False, False]


class TestParams:
    @pytest.mark.parametrize(
        ("job", "values", "message"),
        [
            (
                "jobs.steer",
                {"layer": 1, "doze": 0.1},
                "has no parameter ['doze'] (did you mean 'dose'?); it takes ['choices',",
            ),
            ("jobs.steer", {"layer": 1, "doze": 0.1}, "did you mean 'dose'?"),
            ("jobs.steer", {"layer": 1, "dose": 0.1, "max_tokens": 3}, "did you mean 'max_new_tokens'?"),
            ("jobs.steer", {"layer": 1}, "dose=None, multiplier=None; give one of them"),
            (
                "jobs.steer",
                {"layer": 1, "dose": 0.1, "multiplier": 2.0},
                "dose=0.1, multiplier=2.0; give one",
            ),
            ("jobs.steer", {"layer": 1, "dose": 0.1, "layers": [2, 1]}, "give each layer once"),
            ("jobs.steer", {"layer": 1, "dose": 0.1, "weights": [1.0, 2.0]}, "give one for each of 1 layers"),
            ("jobs.steer", {}, "needs the parameters ['layer']"),
            ("jobs.steer", {"layer": 1.0, "dose": 0.1}, "layer=1.0; it takes a whole number"),
            ("jobs.steer", {"layer": True, "dose": 0.1}, "layer=True; it takes a whole number"),
            ("jobs.steer", {"layer": "1", "dose": 0.1}, "layer='1'; it takes a whole number"),
            ("jobs.steer", {"layer": 1, "dose": "0.1"}, "dose='0.1'; it takes a number or null"),
            ("jobs.steer", {"layer": 1, "dose": True}, "dose=True; it takes a number or null"),
            ("jobs.steer", {"layer": 1, "dose": 0.1, "pairs": 3}, "pairs=3; it takes a text"),
            (
                "jobs.steer",
                {"layer": 1, "dose": 0.1, "direction": "mean"},
                "direction='mean'; it takes one of 'mean_difference'",
            ),
            ("jobs.steer", {"layer": 1, "dose": 0.1, "direction": "mean"}, "'mean_difference', 'pca'"),
            ("jobs.steer", {"layer": -1, "dose": 0.1}, "jobs.steer: layer=-1; layers are counted from 0"),
            (
                "jobs.steer",
                {"layer": 1, "dose": 0.1, "max_new_tokens": 0},
                "max_new_tokens=0; it takes 1 or more",
            ),
            ("jobs.extract", {"offset": 0}, "offset=0; tokens are counted from the end"),
        ],
    )
    def test_a_parameter_that_cannot_be_is_refused_with_what_can(
        self, job: str, values: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(SpecError, match=re.escape(message)):
            make_params(job, values)

    def test_a_whole_number_is_taken_for_a_float(self) -> None:
        params = make_params("jobs.steer", {"layer": 1, "dose": 2})
        assert isinstance(params.dose, float)
        assert params == make_params("jobs.steer", {"layer": 1, "dose": 2.0})

    @pytest.mark.parametrize("given", [[3, 1], (3, 1), [], "all"])
    def test_a_list_is_taken_for_a_tuple(self, given: Any) -> None:
        params = make_params(
            "jobs.capture", {"capture_layers": given or [0], "offsets": given, "max_new_tokens": 1}
        )
        expected = "all" if given == "all" else tuple(given)
        assert (params.capture_layers, params.offsets) == (expected or (0,), expected)
        assert make_params("jobs.capture", json.loads(json.dumps(params_to_json(params)))) == params

    @pytest.mark.parametrize("given", [[1, "2"], [1, 2.0], [True], [[1]], 1, None, "some"])
    def test_a_list_with_anything_else_in_it_is_refused(self, given: Any) -> None:
        with pytest.raises(
            SpecError,
            match=re.escape(
                f"jobs.capture: capture_layers={given!r}; it takes a list, each entry a whole number"
            ),
        ):
            make_params("jobs.capture", {"capture_layers": given})

    @pytest.mark.parametrize("job", JOBS)
    def test_params_survive_json(self, job: str) -> None:
        params = defaults(job)
        assert make_params(job, json.loads(json.dumps(params_to_json(params)))) == params


class TestJobContract:
    def test_these_are_all_the_jobs(self) -> None:
        files = [
            path for path in (ROOT / "jobs").glob("*.py") if re.search(r"^def run\(", path.read_text(), re.M)
        ]
        assert sorted(f"jobs.{path.stem}" for path in files) == sorted(JOBS)

    @pytest.mark.parametrize("job", JOBS)
    def test_params_are_frozen_and_keyword_only_and_each_is_documented(self, job: str) -> None:
        params_type = load_job(job).Params
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(defaults(job), dataclasses.fields(params_type)[0].name, None)
        said = "\n".join(str(base.__doc__) for base in params_type.__mro__ if dataclasses.is_dataclass(base))
        for field in dataclasses.fields(params_type):
            assert field.kw_only
            assert re.search(rf"^ +{field.name}: \S", said, re.M), field.name

    @pytest.mark.parametrize("job", JOBS)
    def test_what_a_job_declares_names_its_own_parameters(self, job: str) -> None:
        module = load_job(job)
        names = {field.name for field in dataclasses.fields(module.Params)}
        assert {*(module.PACK_BY or ()), *module.DATA, *module.LAYERS} <= names
        assert all(metric.meaning and metric.unit for metric in module.METRICS.values())
        assert all(isinstance(getattr(defaults(job), name), (int, tuple, str)) for name in module.LAYERS)
        assert all(number > 0 for number in module.size(defaults(job)))

    @pytest.mark.parametrize("job", JOBS)
    def test_the_canonical_form_is_its_own(self, job: str) -> None:
        module = load_job(job)
        once = module.canonical(defaults(job))
        assert module.canonical(once) == once

    @pytest.mark.parametrize("job", JOBS)
    def test_the_projects_own_data_passes_the_check(self, job: str) -> None:
        values = {"source": "claims", "pairs": "claims", "count": 60} if job == "jobs.extract" else {}
        load_job(job).check(defaults(job))
        load_job(job).check(make_params(job, REQUIRED.get(job, {}) | values))

    @pytest.mark.parametrize(
        ("job", "change", "message"),
        [
            ("jobs.extract", {"pairs": "absent"}, "no dataset 'absent'"),
            (
                "jobs.extract",
                {"source": "claims", "pairs": "tone_pairs", "count": 9},
                "'statement' is absent or empty",
            ),
            ("jobs.steer", {"pairs": "claims"}, "'positive' is absent or empty"),
            ("jobs.steer", {"choices_report": 1000}, "1000 are asked for"),
            ("jobs.steer", {"prompts": "absent"}, "no dataset 'absent'"),
            ("jobs.honesty", {"claims_extract": 1000}, "1000 + 60 + 60 are asked for"),
            ("jobs.generate", {"prompts": "claims"}, "'prompt' is absent or empty"),
            ("jobs.judge", {"prompts": "claims"}, "'prompt' is absent or empty"),
            ("jobs.judge", {"address": ""}, "nothing is sent anywhere without one"),
            ("jobs.classify", {"replies": "open_prompts"}, "it takes one of 'reply' and 'text'"),
            ("jobs.capability", {"questions": "open_prompts"}, "'question' is absent or empty"),
            ("jobs.capability", {"text": "claims"}, "'text' is absent or empty"),
            ("jobs.generate", {"scorers": ["exact"]}, "lacks ['answer'], which scorer 'exact' needs"),
        ],
    )
    def test_data_that_cannot_be_used_is_refused_before_anything_runs(
        self, job: str, change: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(SpecError, match=re.escape(message)):
            load_job(job).check(make_params(job, REQUIRED.get(job, {}) | change))

    @pytest.mark.parametrize("name", ["jobs.absent", "absent", "absent.steer", "jobs.steer.run"])
    def test_a_job_that_does_not_exist_is_refused_by_name(self, name: str) -> None:
        with pytest.raises(SpecError, match=f"no job '{name}'"):
            load_job(name)

    def test_a_module_that_is_no_job_is_refused_with_what_it_lacks(self) -> None:
        with pytest.raises(SpecError, match=r"jobs.spec is not a job module: it lacks \['Params', 'METRICS'"):
            load_job("jobs.spec")

    def test_an_import_that_fails_inside_a_job_is_not_taken_for_a_wrong_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "job_that_needs_more.py").write_text("import package_that_nobody_has\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="package_that_nobody_has"):
            load_job("job_that_needs_more")


class TestMakeSpec:
    @pytest.mark.parametrize("job", [*STEERED, "jobs.judge"])
    @given(
        layer=st.integers(0, 40),
        dose=st.sampled_from([0.0, -0.0, 0]),
        pca=st.booleans(),
        component=st.integers(0, 9),
    )
    def test_a_dose_of_zero_is_one_spec_over_layers_and_directions(
        self, job: str, layer: int, dose: float, pca: bool, component: int
    ) -> None:
        values = {"layer": layer, "dose": dose, "component": component}
        values["direction"] = "pca" if pca else "mean_difference"
        spec = spec_of(job, **values)
        assert spec == spec_of(job, layer=0, dose=0.0)
        assert spec.id == spec_of(job, layer=0, dose=0.0).id

    @pytest.mark.parametrize("change", [{"layer": 2}, {"dose": -0.5}, {"dose": 0.25}, {"direction": "pca"}])
    def test_another_dose_layer_or_direction_is_another_spec(self, change: dict[str, Any]) -> None:
        values = {"layer": 1, "dose": 0.5}
        assert spec_of("jobs.steer", **values | change).id != spec_of("jobs.steer", **values).id

    def test_a_dose_of_zero_still_depends_on_what_is_read(self) -> None:
        values = {"layer": 1, "dose": 0.0}
        other = spec_of("jobs.steer", **values, max_new_tokens=3)
        assert other.id != spec_of("jobs.steer", **values).id

    def test_the_component_matters_to_principal_components_only(self) -> None:
        first, second = ({"layer": 1, "dose": 0.5, "component": component} for component in (0, 1))
        assert spec_of("jobs.steer", **first) == spec_of("jobs.steer", **second)
        assert spec_of("jobs.steer", **first, direction="pca") != spec_of(
            "jobs.steer", **second, direction="pca"
        )

    def test_the_model_and_the_seed_are_part_of_the_spec(self) -> None:
        requirement = Requirement(job="jobs.extract", params=defaults("jobs.extract"))
        spec = make_spec(requirement, model=MODEL, seed=0)
        assert make_spec(requirement, model=MODEL, seed=1).id != spec.id
        assert make_spec(requirement, model=dataclasses.replace(MODEL, id="other"), seed=0).id != spec.id

    def test_other_content_of_the_same_file_is_another_spec(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.jsonl"
        path.write_text('{"positive": "a", "negative": "b"}\n')
        before = spec_of("jobs.extract", pairs=str(path))
        assert before.data == {"pairs": data_hash(str(path))}
        path.write_text('{"positive": "a", "negative": "c"}\n')
        assert spec_of("jobs.extract", pairs=str(path)).id != before.id
        with pytest.raises(SpecError, match="no dataset"):
            spec_of("jobs.extract", pairs=str(tmp_path / "absent.jsonl"))

    def test_a_dataset_is_one_of_our_own_by_name_or_any_file_by_path(self, tmp_path: Path) -> None:
        assert locate_data("tone_pairs").name == "tone_pairs.jsonl"
        assert locate_data("claims").name == "claims.csv"
        path = tmp_path / "tone_pairs"
        path.write_text("")
        assert locate_data(str(path)) == path.resolve()


def spec_of(job: str, **values: Any) -> Spec:
    return make_spec(Requirement(job=job, params=make_params(job, values)), model=MODEL, seed=0)


class TestRequirements:
    def test_equal_requirements_have_equal_keys_and_others_do_not(self) -> None:
        def key(job: str = "jobs.extract", **values: Any) -> str:
            return Requirement(job=job, params=make_params(job, values)).key

        assert key() == key(pairs="tone_pairs", count=0)
        assert len({key(), key(count=3), key(pairs="formality_pairs"), key(method="pca")}) == 4

    def test_all_layers_and_doses_of_a_grid_need_the_same_two_artifacts(self) -> None:
        needed = [
            requirement
            for layer in range(4)
            for dose in (-0.5, 0.5, 1.0)
            for requirement in steer.requires(steer.Params(layer=layer, dose=dose))
        ]
        assert {requirement.job for requirement in needed} == {"jobs.extract", "jobs.steer"}
        assert len({requirement.key for requirement in needed}) == 2

    @pytest.mark.parametrize("job", JOBS)
    def test_requirements_end(self, job: str) -> None:
        def follow(requirement: Requirement, above: tuple[str, ...]) -> None:
            assert requirement.key not in above
            assert len(above) < 10
            for need in load_job(requirement.job).requires(requirement.params):
                follow(need, (*above, requirement.key))

        follow(Requirement(job=job, params=defaults(job)), ())

    def test_what_is_required_is_the_same_work_as_the_trial_of_dose_zero(self) -> None:
        [_, unsteered] = steer.requires(steer.Params(layer=3, dose=0.5, max_new_tokens=5))
        required = make_spec(unsteered, model=MODEL, seed=0)
        assert required.id == spec_of("jobs.steer", layer=7, dose=0.0, max_new_tokens=5).id


class TestCodeVersion:
    @pytest.fixture
    def versions(self, tmp_path: Path) -> Callable[[], dict[str, str]]:
        """Gives the code versions of all jobs in a copy of the folder `jobs`, which may be edited."""
        shutil.copytree(ROOT / "jobs", tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
        script = (
            "import json; from jobs.resolve import code_version; "
            f"print(json.dumps({{job: code_version(job) for job in {JOBS}}}))"
        )

        def compute() -> dict[str, str]:
            command = [sys.executable, "-B", "-c", script]
            found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
            versions: dict[str, str] = json.loads(found.stdout)
            return versions

        return compute

    def test_comments_docstrings_and_layout_do_not_change_it(
        self, tmp_path: Path, versions: Callable[[], dict[str, str]]
    ) -> None:
        before = versions()
        for path in (tmp_path / "jobs").rglob("*.py"):
            text = re.sub(r'^( *)"""(?=\w)', r'\1"""In other words: ', path.read_text(), flags=re.M)
            text = re.sub(r"^(\w+) = ", r"# and why\n\n\1   =   ", text, flags=re.M)
            path.write_text(text + "\n# the end\n")
        assert "In other words" in (tmp_path / "jobs/steer.py").read_text()
        assert versions() == before

    @pytest.mark.parametrize(
        ("path", "changed"),
        [
            ("steer.py", {"jobs.steer"}),
            ("reading/readout.py", {"jobs.steer", "jobs.tune"}),
            (
                "reading/completions.py",
                {
                    *("jobs.capability", "jobs.capture", "jobs.generate"),
                    *(
                        "jobs.honesty",
                        "jobs.judge",
                        "jobs.steer",
                        "jobs.adapters",
                        "jobs.sample",
                        "jobs.finetune",
                        "jobs.tune",
                    ),
                    *(LEARNED - {"jobs.calibrate"}),
                },
            ),
            ("scoring/scorers.py", {"jobs.generate", "jobs.judge"}),
            ("extract.py", DIRECTED),
            ("data/pairs.py", DIRECTED),
            ("engine/memory.py", set(JOBS)),
            ("engine/loading.py", set(JOBS)),
            ("directions/contrast.py", DIRECTED),
            ("unsupervised/sphere.py", LEARNED),
            (
                "scoring/statistics.py",
                {
                    *("jobs.capability", "jobs.classify", "jobs.honesty", "jobs.judge", "jobs.steer"),
                    "jobs.tune",
                },
            ),
        ],
    )
    def test_code_changes_it_for_every_job_that_reaches_the_code_and_no_other(
        self, tmp_path: Path, versions: Callable[[], dict[str, str]], path: str, changed: set[str]
    ) -> None:
        before = versions()
        with (tmp_path / "jobs" / path).open("a") as file:
            file.write("\nADDED = 1\n")
        assert {job for job, version in versions().items() if version != before[job]} == changed

    @pytest.mark.parametrize("library", ["torch", "transformers"])
    def test_another_version_of_a_library_under_the_job_changes_it(
        self, library: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = code_version("jobs.steer")
        installed = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: "0.0" if name == library else installed(name)
        )
        code_version.cache_clear()
        try:
            assert code_version("jobs.steer") != before
        finally:
            code_version.cache_clear()
