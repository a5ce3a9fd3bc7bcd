"""summary@<run>: the run's row in `dvc metrics show`; metrics/<run>.json."""

import dataclasses

from regvit.files import write_json
from regvit.pipeline.command import command
from regvit.pipeline.params import entry_of, load_params
from regvit.pipeline.studies import study_of
from regvit.report.results import Results
from regvit.report.summary import summary


def main(name: str) -> None:
    params = load_params()
    backbone = entry_of(params, "runs", name).backbone
    study = study_of(params)
    alone = dataclasses.replace(study, runs={name: study.runs[name]}, backbones={backbone: study.backbones[backbone]})
    figures = summary(Results.measured(alone), name)
    write_json(f"metrics/{name}.json", figures)
    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))


if __name__ == "__main__":
    command(main, "run", interrupted="metrics/{0}.json is not finished")
