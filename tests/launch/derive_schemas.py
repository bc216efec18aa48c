"""Derive tests/launch/schemas from the models of Kubeflow's package, for the fields that launch/kubernetes uses.

    python -m pip install kubeflow-trainer-api==2.3.0
    python -m tests.launch.derive_schemas

The package (Apache-2.0) has the types of Kubernetes, JobSet and Kubeflow Trainer. A type that a manifest uses keeps all
its fields. The type of a field that no manifest uses is left open, which keeps a schema below 15 kB.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).parent / "schemas"
MANIFESTS = Path(__file__).parents[2] / "launch" / "kubernetes"
MODELS = {
    "Service": "IoK8sApiCoreV1Service",
    "Job": "IoK8sApiBatchV1Job",
    "JobSet": "JobsetV1alpha2JobSet",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
    "TrainJob": "TrainerV1alpha1TrainJob",
}
"""The package's model of each kind of object."""
NUMBER_OR_STRING = ("ResourceQuantity", "IntOrString")
"""Ends of the names of the types whose values have either form."""


def manifests() -> list[dict[str, Any]]:
    """All objects of all manifests."""
    return [each for path in sorted(MANIFESTS.glob("*.yaml")) for each in yaml.safe_load_all(path.read_text())]


def narrowed(schema: dict[str, Any], definitions: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """The part of a model's schema that describes `values`, without references and prose, closed to unknown fields."""
    branches = [each for each in schema.get("anyOf", ()) if each.get("type") != "null"]
    if branches:
        schema = branches[0]
    if not values:
        return {}
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name.endswith(NUMBER_OR_STRING):
            return {"type": ["number", "string"]}
        schema = definitions[name]
    if schema.get("type") == "array":
        items = [each for value in values if isinstance(value, list) for each in value]
        return {"type": "array", "items": narrowed(schema["items"], definitions, items)}
    if "properties" in schema:
        found = [value for value in values if isinstance(value, dict)]
        fields = {
            name: narrowed(field, definitions, [value[name] for value in found if name in value])
            for name, field in schema["properties"].items()
        }
        closed = {"type": "object", "properties": fields, "additionalProperties": False}
        return closed | ({"required": schema["required"]} if "required" in schema else {})
    if isinstance(schema.get("additionalProperties"), dict):
        inner = [each for value in values if isinstance(value, dict) for each in value.values()]
        return {"type": "object", "additionalProperties": narrowed(schema["additionalProperties"], definitions, inner)}
    return {key: schema[key] for key in ("type", "enum") if key in schema}


def main() -> None:
    models = importlib.import_module("kubeflow_trainer_api.models")
    for kind, name in MODELS.items():
        schema = getattr(models, name).model_json_schema()
        used = [each for each in manifests() if each["kind"] == kind]
        path = SCHEMAS / f"{kind}.json"
        path.write_text(json.dumps(narrowed(schema, schema.get("$defs", {}), used), indent=1, sort_keys=True) + "\n")
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
