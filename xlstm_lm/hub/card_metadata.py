"""The part of a model card that the hub reads: license, languages, data sets, papers, results.

The fields: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import difflib
import importlib.resources
import json
import re
from dataclasses import dataclass
from typing import Any

from xlstm_lm.hub.formats.export_format import ExportFormat

# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr "
    "mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr "
    "deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "grok2-community gemma unknown other"
).split()


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """Facts for the model card that neither the run nor the model knows."""

    license: str | None = None
    """License of the weights, by the hub's name for it; in any case of letters. None leaves it out of the card."""
    license_name: str | None = None
    """Name of a license that the hub has no name for (license other), such as my-license-1.0."""
    license_link: str | None = None
    """Address of its text."""
    languages: tuple[str, ...] = ()
    """ISO 639 codes of the languages of the training data; code for programming languages."""
    base_model: str | None = None
    """Id on the hub of the model that was tuned; None for the one that the run was imported from, if any."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: a license, language or id that the hub would refuse; says what is allowed.
        """
        if self.license is not None:
            object.__setattr__(self, "license", self.license.lower())
            _check_license(self.license)
        named = self.license_name is not None or self.license_link is not None
        if named != (self.license == "other") or (named and not (self.license_name and self.license_link)):
            raise ValueError(
                "--license other needs --license-name and --license-link, and these two go with no other license."
            )
        if self.license_name and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license_name):
            raise ValueError(
                f"--license-name {self.license_name!r}: the hub allows lowercase letters, digits, dots and dashes, as "
                "in my-license-1.0."
            )
        if self.license_link and not re.fullmatch(r"https?://\S+", self.license_link):
            raise ValueError(f"--license-link {self.license_link!r}: give the address of its text, https://...")
        for language in self.languages:
            _check_language(language)
        if self.base_model is not None:
            _check_model_id(self.base_model)


def _check_license(name: str) -> None:
    if name not in LICENSES:
        close = difflib.get_close_matches(name, LICENSES, n=3, cutoff=0.6)
        hint = (
            f"Did you mean {' or '.join(close)}? " if close else "Well-known ones are apache-2.0, mit and cc-by-4.0. "
        )
        raise ValueError(
            f"--license {name}: the hub has no license of that name. {hint}For any other give --license other, with "
            "--license-name and --license-link. The list: https://huggingface.co/docs/hub/repositories-licenses"
        )


def _check_language(code: str) -> None:
    # The hub's table of ISO 639-1 codes, and of ISO 639-3 where there is no shorter one.
    table = importlib.resources.files("datasets.utils.resources") / "languages.json"
    names: dict[str, str] = json.loads(table.read_text(encoding="utf-8"))
    if code not in names:
        lower = code.lower()
        close = [known for known, name in names.items() if lower in (known.lower(), name.lower())]
        close += [known for known in names if len(known) == 2 and lower.startswith(known)]
        hint = f"Did you mean {close[0]} ({names[close[0]]})? " if close else ""
        raise ValueError(
            f"--language {code}: not an ISO 639 code. {hint}Give codes such as en, de or zh; code for code."
        )


def _check_model_id(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--base-model {name}: {error} Give an id on the hub, such as NX-AI/xLSTM-7b.") from error


def make_metadata(
    *,
    name: str,
    options: CardOptions,
    model_config: Any,
    export_format: ExportFormat,
    base_model: str | None,
    datasets: list[str],
    results: dict[str, float],
) -> dict[str, Any]:
    """The mapping at the top of a model card.

    `datasets` are ids on the hub, `results` values by the name of the metric. Fields without a value are left out.
    """
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    metadata |= {
        "license": options.license,
        "license_name": options.license_name,
        "license_link": options.license_link,
        "language": list(options.languages),
        "base_model": options.base_model or base_model,
        "datasets": datasets,
    }
    custom_code = ["custom_code"] * (export_format.write_code is not None)
    metadata["tags"] = ["xlstm-lm", *custom_code, *(f"arxiv:{paper}" for paper in papers(model_config))]
    if results:
        held_out = {"name": "held-out documents", "type": (datasets or ["local"])[0]}
        metrics = [{"type": metric, "value": round(value, 4)} for metric, value in results.items()]
        entry = {"task": {"type": "text-generation"}, "dataset": held_out, "metrics": metrics}
        metadata["model-index"] = [{"name": name, "results": [entry]}]
    return {field: value for field, value in metadata.items() if value}


def papers(model_config: Any) -> list[str]:
    """arXiv identifiers of the papers that describe the blocks of a model."""
    return sorted({paper for mixer in model_config.block_mixers() for paper in mixer.papers()})
