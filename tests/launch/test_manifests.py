"""The Kubernetes manifests: valid for the API's types, consistent with each other and with the scripts they start."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.launch.derive_schemas import MANIFESTS, MODELS, SCHEMAS
from tests.launch.scripts import LAUNCH, REPOSITORY

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: python -m pip install -e '.[dev]'")

OBJECTS = [
    (path.stem, each) for path in sorted(MANIFESTS.glob("*.yaml")) for each in yaml.safe_load_all(path.read_text())
]
API = {
    "Service": "v1",
    "Job": "batch/v1",
    "JobSet": "jobset.x-k8s.io/v1alpha2",
    "TrainingRuntime": "trainer.kubeflow.org/v1alpha1",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
}
each_object = pytest.mark.parametrize(
    "manifest", [each for _, each in OBJECTS], ids=[f"{s}-{e['kind']}" for s, e in OBJECTS]
)


def problems(manifest: dict[str, Any]) -> list[str]:
    """The places of a manifest that its kind's schema does not allow."""
    schema = json.loads((SCHEMAS / f"{manifest['kind']}.json").read_text())
    return [
        f"{each.json_path}: {each.message}" for each in jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    ]


def inside(value: Any, name: str) -> Iterator[Any]:
    """Every value of a field name at any depth."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        if key == name:
            yield each
        yield from inside(each, name)


@each_object
def test_manifests_are_valid(manifest):
    assert API[manifest["kind"]] == manifest["apiVersion"]
    assert problems(manifest) == []


def test_every_kind_has_a_manifest_and_none_is_of_the_deprecated_operator():
    assert {each["kind"] for _, each in OBJECTS} == set(MODELS) == set(API)


def fields_of(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every mapping of a manifest that has named fields, not labels or resources of free names."""
    free = {"labels", "selector", "limits", "matchLabels"}
    if isinstance(value, dict) and not free & set(place):
        yield place
    for key, each in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from fields_of(each, (*place, key))


@each_object
def test_a_wrong_field_is_found_wherever_it_is(manifest):
    places = list(fields_of(manifest))
    for place in places:
        wrong = copy.deepcopy(manifest)
        target = wrong
        for key in place:
            target = target[key]
        target["imagine"] = 1
        assert any("'imagine' was unexpected" in each for each in problems(wrong)) or target.keys() == {"imagine"}, (
            place
        )
    assert len(places) > 2


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("Job", "completions", "8"),
        ("JobSet", "maxRestarts", "many"),
        ("JobSet", "values", ["1"]),
        ("TrainJob", "numNodes", [8]),
        ("Service", "publishNotReadyAddresses", "yes"),
    ],
)
def test_a_wrong_type_is_found(kind, place, value):
    wrong = copy.deepcopy(next(each for _, each in OBJECTS if each["kind"] == kind))

    def put(node: Any) -> None:
        for key, each in node.items() if isinstance(node, dict) else enumerate(node if isinstance(node, list) else ()):
            if key == place:
                node[key] = value
            else:
                put(each)

    put(wrong)
    assert problems(wrong) != []


@each_object
def test_pods_run_our_script_on_a_recipe_that_exists(manifest):
    for command, arguments in zip(inside(manifest, "command"), inside(manifest, "args")):
        assert (REPOSITORY / command[0]).stat().st_mode & 0o111
        assert arguments[0] == "--config" and (REPOSITORY / arguments[1]).is_file()
    for image in inside(manifest, "image"):
        assert f"-t {image} " in (LAUNCH / "container" / "Dockerfile").read_text()


@each_object
def test_failure_policies_read_the_exit_codes_of_pod_sh(manifest):
    documented = set(re.findall(r"^#   (\d+) ", (MANIFESTS / "pod.sh").read_text(), re.MULTILINE))
    assert documented == {"0", "75", "1"}
    save_seconds = int(re.search(r"SAVE_SECONDS:-(\d+)", (LAUNCH / "torchrun.sh").read_text())[1])
    for template in inside(manifest, "podFailurePolicy"):
        assert [rule["onExitCodes"]["values"] for rule in template["rules"] if rule["action"] == "FailJob"] == [[1]]
        assert {rule["action"] for rule in template["rules"]} <= {"FailJob", "Ignore", "Count", "FailIndex"}
        containers = {each["name"] for pod in inside(manifest, "containers") for each in pod}
        assert all(name in containers for name in inside(template, "containerName"))
    for policy in inside(manifest, "failurePolicy"):
        assert [rule["action"] for rule in policy["rules"]] == ["FailJobSet"]
        assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    for seconds in inside(manifest, "terminationGracePeriodSeconds"):
        assert seconds > save_seconds


def test_nodes_and_names_agree():
    job, jobset = (next(each for _, each in OBJECTS if each["kind"] == kind) for kind in ("Job", "JobSet"))
    service = next(each for _, each in OBJECTS if each["kind"] == "Service")
    replicated = jobset["spec"]["replicatedJobs"][0]
    for name, spec in (
        ("xlstm-lm-0.xlstm-lm", job["spec"]),
        ("xlstm-lm-node-0-0.xlstm-lm", replicated["template"]["spec"]),
    ):
        variables = {each["name"]: each.get("value") for each in next(inside(spec, "env"))}
        assert int(variables["NNODES"]) == spec["completions"] == spec["parallelism"]
        assert variables["RENDEZVOUS"].startswith(f"{name}:")
        assert spec["completionMode"] == "Indexed", "gives JOB_COMPLETION_INDEX, from which pod.sh numbers the nodes"
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert jobset["metadata"]["name"] == "xlstm-lm" and replicated["name"] == "node"
