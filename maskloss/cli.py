"""The command line: `maskloss` and `python -m maskloss`.

Each command is a function here; its options are the function's parameters, and those of `train` the fields
of `TrainConfig`. An error is one line on stderr: exit code 2 for bad arguments or input, 1 for a run that
failed or a check that found errors.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ArgumentParser

from maskloss import __version__
from maskloss.errors import InputError, RunError, interrupt_by_exception, one_line
from maskloss.screen import messages_on_screen

logger = logging.getLogger(__name__)

Device = Literal["cpu", "cuda", "auto"]

#: Letters of a line of `check`, which has up to three examples.
_REPORT_LENGTH = 800
#: Of a picture's name, in bytes; file systems take 255 for the whole name.
_LONGEST_STEM = 200


def demo(output: str = "runs/demo", max_steps: int = 260, seed: int = 0, device: Device = "auto") -> None:
    """Train a small Mask R-CNN on synthetic shapes, evaluate it and show the result.

    An interrupted demo goes on where it stopped.

    Args:
        output: folder of the run, with the data in `data/`.
        max_steps: optimizer steps.
        seed: of the data and the training.
        device: where to train.
    """
    from maskloss.data.shapes import write_shapes
    from maskloss.training.config import TrainConfig

    if not 0 <= seed < 2**61:
        raise InputError(f"--seed must be at least 0 and below 2^61, got {one_line(seed, 80)}")
    folder = Path(output)
    for name, num_images, offset in (("train", 512, 0), ("val", 96, 1)):
        part = folder / "data" / name
        # The annotation file is written last: with it, the data are whole.
        if not (part / "annotations.json").exists():
            if part.exists() and any(part.glob("*")):
                raise InputError(f"{part}: holds half a data set; remove it, or name another --output")
            write_shapes(part, num_images, size=128, seed=2 * seed + offset)
    config = TrainConfig(
        train_images=str(folder / "data/train/images"),
        train_annotations=str(folder / "data/train/annotations.json"),
        val_images=str(folder / "data/val/images"),
        val_annotations=str(folder / "data/val/annotations.json"),
        output=output,
        model="resnet18",
        loss="aligned",
        max_steps=max_steps,
        batch_size=8,
        optimizer="adamw",
        learning_rate=5e-4,
        weight_decay=1e-3,
        warmup_steps=20,
        schedule="cosine",
        min_size=128,
        max_size=128,
        seed=seed,
        log_every=10,
        workers=1,
        checkpoint_every=50,
        device=device,
        resume=True,
    )
    _train_and_report(config)


def shapes(output: str, images: int, size: int = 128, seed: int = 0) -> None:
    """Write synthetic COCO-format data: circles, rectangles and triangles.

    Args:
        output: a new folder; gets images/ and annotations.json.
        images: how many.
        size: of each image, px a side.
        seed: the same seed gives the same pictures.
    """
    from maskloss.data.shapes import write_shapes

    if not 0 <= seed < 2**63:
        raise InputError(f"--seed must be at least 0 and below 2^63, got {one_line(seed, 80)}")
    if size > 16_384:
        raise InputError(f"--size must be at most 16,384 px, got {one_line(size, 80)}")
    write_shapes(output, images, size=size, seed=seed)
    print(f"{output}: {images} images of {size} x {size} px")


def check(images: str, annotations: str, all: bool = False) -> None:
    """Find what would break or distort training; exits with 1 if there are errors.

    Args:
        images: folder of the images.
        annotations: COCO-format JSON.
        all: list every case of each kind of fault, not three of them.
    """
    from maskloss.data.check import check_data

    data, problems = check_data(images, annotations, progress=True)
    for problem in problems:
        print(one_line(problem, _REPORT_LENGTH))
        if all and len(problem.examples) > 1:
            for example in problem.examples:
                print("  " + one_line(example, _REPORT_LENGTH))
    errors = sum(problem.error for problem in problems)
    if data is not None:
        _print_contents(data)
    print(f"{errors} errors, {len(problems) - errors} warnings")
    if errors:
        sys.exit(1)


def repair(
    images: str,
    annotations: str,
    output: str,
    crowds: Literal["keep", "objects"] = "keep",
    boxes: Literal["keep", "from-masks"] = "keep",
) -> None:
    """Write an annotation file without errors, and list what was changed and left out.

    Args:
        images: folder of the images.
        annotations: COCO-format JSON; it stays as it is.
        output: the new file; the list is written beside it as OUTPUT.repairs.json, without ".json" in between.
        crowds: "objects" makes each crowd an object, for annotation tools that write brush masks as crowds.
        boxes: "from-masks" takes the boxes from the masks.
    """
    from maskloss.data import repair as repairing

    data, repairs = repairing.repair(images, annotations, output, crowds=crowds, boxes=boxes)
    for made in repairs:
        print(made)
    if not repairs:
        print("nothing to repair")
    _print_contents(data)
    print(output)


def subset(
    images: str,
    annotations: str,
    output: str,
    images_per_class: int | None = None,
    max_images: int | None = None,
    fraction: float | None = None,
    rest: str | None = None,
    categories: str | None = None,
) -> None:
    """Copy a part of a COCO-format data set.

    Args:
        images: folder of the images.
        annotations: COCO-format JSON.
        output: a new folder; gets images/ and annotations.json.
        images_per_class: take images until each category is in so many, if there are so many.
        max_images: take at most so many images.
        fraction: take this share of the images, and of those of each category.
        rest: a new folder that gets the other images, with --fraction.
        categories: names, separated by commas; only these, and images with objects of them.
    """
    from maskloss.data.subset import write_subset

    names = None if categories is None else [name.strip() for name in categories.split(",")]
    data = write_subset(
        images,
        annotations,
        output,
        images_per_class=images_per_class,
        max_images=max_images,
        fraction=fraction,
        rest=rest,
        categories=names,
    )
    for warning in data.warnings:
        logger.warning("%s", warning)
    print(
        f"{output}: {len(data.images)} images, {data.num_objects} objects, {len(data.categories)} categories"
    )


def train(**options: Any) -> None:
    """Train a Mask R-CNN on COCO-format data, evaluate it and write a report."""
    from maskloss.training.config import TrainConfig

    _train_and_report(TrainConfig(**options))


def evaluate(
    checkpoint: str,
    images: str,
    annotations: str,
    output: str,
    loss: str | dict[str, Any] | None = None,
    model: str | None = None,
    mask_branch: str | None = None,
    batch_size: int = 2,
    max_detections: int | None = None,
    device: Device = "auto",
) -> None:
    """Compute losses, and AP of boxes, masks and boundaries, of a trained model.

    The losses are those of the model's own training, from its file. Where that names a user's code, which is not
    imported because a file says so, the losses are computed only if it is given again.

    Args:
        checkpoint: model.safetensors of a run, or the run's folder.
        images: folder of the images.
        annotations: COCO-format JSON.
        output: folder that gets metrics.json and results.json.
        loss: a preset, an import path, or a mapping as JSON, where the file's own cannot be used or another is wanted.
        model: the import path of the model, where it is made by a user's code.
        mask_branch: the import path of the mask branch, where it is made by a user's code.
        batch_size: images that are loaded together.
        max_detections: most objects that are detected in an image, and that AP counts of one category in one; the
            model's own where not given.
        device: where to run.
    """
    from maskloss.data.coco import read_coco
    from maskloss.files import locked, make_folder, write_text
    from maskloss.training import evaluation
    from maskloss.training.metrics import write_metrics
    from maskloss.training.model_file import load_model
    from maskloss.training.setup import chosen_device

    if not 1 <= batch_size <= 100_000:
        raise InputError(f"--batch-size must be in 1 to 100,000, got {one_line(batch_size, 80)}")
    chosen = chosen_device(device)
    loaded = load_model(
        checkpoint, loss=loss, max_detections=max_detections, model=model, mask_branch=mask_branch
    )
    data = read_coco(images, annotations, categories=loaded.description.categories)
    folder = Path(output)
    for name in ("metrics.json", "results.json"):
        _refuse_to_overwrite(folder / name)
    make_folder(folder)
    with locked(folder):
        for warning in data.warnings:
            logger.warning("%s", warning)
        evaluation.warn_of_crowded_images(data, loaded.description.settings.max_detections)
        if loaded.loss_config is None:
            own = loaded.description.loss
            print(
                "no losses: the model's file does not say with which loss it was trained; give --loss"
                if own is None
                else f"no losses: the model was trained with {own if isinstance(own, str) else 'code of a user'}, "
                "which is imported only if it is given by --loss",
                file=sys.stderr,
            )
        found = evaluation.evaluate(
            loaded.model.to(chosen),
            data,
            batch_size=batch_size,
            device=chosen,
            losses=loaded.loss_config is not None,
            crowds=loaded.description.crowds,
        )
        write_text(folder / "results.json", json.dumps(found.results))
        write_metrics(folder / "metrics.json", found.metrics)
    _print_metrics(found.metrics)
    print(folder / "metrics.json")


def predict(
    image: list[str],
    checkpoint: str,
    output: str,
    score_threshold: float = 0.5,
    max_detections: int | None = None,
    loss: str | None = None,
    model: str | None = None,
    mask_branch: str | None = None,
    device: Device = "auto",
) -> None:
    """Draw a trained model's masks over images.

    Args:
        image: files to predict.
        checkpoint: model.safetensors of a run.
        output: folder that gets a PNG per image and results.json in COCO's results format.
        score_threshold: leave out detections of lower scores.
        max_detections: most objects that are detected in an image; the model's own where not given.
        loss: the import path of the model's loss, where masks come from a mask term of a user's own.
        model: the import path of the model, where it is made by a user's code.
        mask_branch: the import path of the mask branch, where it is made by a user's code.
        device: where to run.
    """
    from maskloss.files import locked, make_folder, write_bytes, write_text
    from maskloss.report.pictures import draw_results, png
    from maskloss.training import prediction
    from maskloss.training.model_file import load_model
    from maskloss.training.setup import chosen_device

    if not 0 <= score_threshold <= 1:
        raise InputError(f"--score-threshold must be in [0, 1], got {score_threshold}")
    chosen = chosen_device(device)
    loaded = load_model(
        checkpoint, loss=loss, max_detections=max_detections, model=model, mask_branch=mask_branch
    )
    description = loaded.description
    folder = Path(output)
    planned: set[str] = set()
    for path in image:
        _free_name(Path(path).stem, planned)
    # The folder may be where the photos are.
    for name in ("results.json", *sorted(planned)):
        _refuse_to_overwrite(folder / name)
    make_folder(folder)
    names = {category.id: category.name for category in description.categories}
    results: list[dict[str, Any]] = []
    taken: set[str] = set()
    with locked(folder):
        try:
            for found in prediction.predict(
                loaded.model.to(chosen), description, image, device=chosen, score_threshold=score_threshold
            ):
                file_name = _free_name(found.path.stem, taken)
                write_bytes(folder / file_name, png(draw_results(found.image, found.results, names)))
                results += [{**result, "file_name": found.path.name} for result in found.results]
                print(f"{folder / file_name}: {len(found.results)} objects")
        finally:
            # Also when a later image fails: what was found is kept.
            if taken:
                write_text(folder / "results.json", json.dumps(results))
    print(folder / "results.json")


def ablate(
    config: str, output: str, engine: Literal["local", "ray"] = "local", ray_address: str | None = None
) -> None:
    """Train variants of a config over several seeds, and say which differ and by how much.

    A sweep that was stopped goes on where it stopped.

    Args:
        config: YAML with `base`, `variants`, `seeds`, and where wanted `baseline`, `cpus` and `gpus`.
        output: folder of the sweep; gets runs/, results.json, table.md and report.html.
        engine: "local" runs one after another on this machine, "ray" hands the runs to Ray.
        ray_address: of an existing Ray cluster; a local one is started where not given.
    """
    from maskloss.ablation import sweep

    page = sweep.ablate(config, output, engine=engine, ray_address=ray_address)
    print((Path(output) / "table.md").read_text("utf-8"))
    print(f"report: {page}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: of the command line, `sys.argv[1:]` where not given.
    """
    for stream in (sys.stdout, sys.stderr):
        # A file's name may hold what the terminal's encoding has not.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _signals_handled(), messages_on_screen():
            _run([_underscored(a) for a in (sys.argv[1:] if arguments is None else arguments)])
    except InputError as error:
        _fail(error, 2)
    except RunError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except _Terminated:
        _fail("terminated", 143)
    except BrokenPipeError:
        # Who reads, such as `head`, has seen enough; what Python would still flush goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _fail_unexpectedly(error)


def _run(arguments: list[str]) -> None:
    parser = _parser(arguments[0] if arguments else "")
    _check_config_files(arguments)
    try:
        options = parser.parse_args(arguments)
        command: str = options.command
        settings = options[command].as_dict()
    except (RecursionError, UnicodeError, OverflowError, MemoryError) as error:
        raise InputError(f"the options cannot be read: {type(error).__name__}: {error}") from error
    if command == "train":
        settings.pop("config")
    # What takes seconds to import comes first: until then, Ctrl-C ends the process in one line.
    import torch  # noqa: F401

    if threading.current_thread() is threading.main_thread():
        interrupt_by_exception()
    COMMANDS[command](**settings)


def _check_config_files(arguments: list[str]) -> None:
    """Read what --config of `train` names more strictly than jsonargparse does."""
    if arguments[:1] != ["train"]:
        return
    from maskloss.training.yaml_files import read_yaml

    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == "--config" and (equals or position + 1 < len(arguments)):
            read_yaml(Path(value if equals else arguments[position + 1]))


class _Terminated(BaseException):
    """SIGTERM: open files are removed or finished on the way out, as at Ctrl-C."""


@contextmanager
def _signals_handled() -> Iterator[None]:
    """Make Ctrl-C and SIGTERM exceptions of this process; forked ones, such as data workers, end with it."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    ours = in_main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(*_: object) -> None:
    raise _Terminated


def _quiet_in_forks() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _fail_unexpectedly(error: Exception) -> NoReturn:
    """Say in one line what nobody foresaw; with MASKLOSS_DEBUG=1 in full."""
    if os.environ.get("MASKLOSS_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    if type(error).__name__ == "OutOfMemoryError":
        _fail(f"out of GPU memory; a lower --batch-size or --min-size needs less: {error}", 1)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        _fail(f"out of memory; a lower --batch-size, --workers or --min-size needs less: {error}", 1)
    if isinstance(error, OSError) and error.filename is not None:
        _fail(f"{error.filename}: {error.strerror or error}", 1)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if str(Path(__file__).parent) in frame.filename] or frames
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "no traceback"
    described = one_line(f"{type(error).__name__}: {error}", 160)
    _fail(f"internal error: {described} ({where}); please report it with what MASKLOSS_DEBUG=1 shows", 1)


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "shapes": shapes,
    "check": check,
    "repair": repair,
    "subset": subset,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "ablate": ablate,
}


class _Parser(ArgumentParser):
    """Options with hyphens on the screen, where jsonargparse has underscores; errors in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = message if len(message) < 10_000 else one_line(message, 2000)
        line = " ".join(part.strip() for part in str(message).splitlines() if part.strip())
        # jsonargparse names an option by its key: "train.max_steps" or Parser key "max_steps".
        line = re.sub(r'Parser key "(?:\w+\.)?(\w+)"', r"--\1", line)
        line = re.sub(rf"(?<![\w./-])(?:{'|'.join(COMMANDS)})\.(\w+)", r"--\1", line)
        print(one_line(f"{self.prog}: error: {_hyphenated(line)}"), file=sys.stderr)
        sys.exit(2)

    def format_help(self) -> str:
        return _hyphenated(super().format_help())

    def format_usage(self) -> str:
        return _hyphenated(super().format_usage())


def _parser(asked: str) -> _Parser:
    """Make the parser, with the options of the command that is asked for; others have their names alone."""
    parser = _Parser(
        prog="maskloss",
        description="Train Mask R-CNN with losses that you can choose.",
        epilog="With MASKLOSS_DEBUG=1 in the environment, an internal error shows its traceback.",
    )
    parser.add_argument("--version", action="version", version=f"maskloss {__version__}")
    commands = parser.add_subcommands(dest="command")
    for name, function in COMMANDS.items():
        summary = (function.__doc__ or "").splitlines()[0]
        command = _Parser(prog=f"maskloss {name}", description=summary)
        if name == asked:
            _add_options(command, name, function)
        commands.add_subcommand(name, command, help=summary)
    return parser


def _add_options(command: _Parser, name: str, function: Callable[..., None]) -> None:
    if name == "train":
        from maskloss.training.config import TrainConfig

        command.add_argument(
            "--config", action="config", help="YAML with any of these, by their names with _"
        )
        command.add_class_arguments(TrainConfig, None, skip={"resume"})
        command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    elif name == "check":
        command.add_function_arguments(function, None, skip={"all"})
        command.add_argument("--all", action="store_true", help="list every case of each kind of fault")
    elif name == "predict":
        command.add_function_arguments(function, None, skip={"image"})
        command.add_argument("image", nargs="+", help="files to predict")
    else:
        command.add_function_arguments(function, None)


def _train_and_report(config: Any) -> None:
    from maskloss.report.page import write_report
    from maskloss.training.loop import train
    from maskloss.training.metrics import labels

    result = train(config)
    if result.main_process:
        page = write_report(config.output_folder, result.validation, result.evaluation.results, labels())
        _print_metrics(result.evaluation.metrics)
        print(f"report: {page}")


def _print_contents(data: Any) -> None:
    labels = {
        "with a mask": data.num_masks,
        "with labeled points": data.num_points,
        "with a weight other than 1": data.num_weights,
    }
    # A mask for every object is the rule, and points and weights are rare.
    said = [
        f"{count} {label}"
        for label, count in labels.items()
        if (count < data.num_objects if label == "with a mask" else count > 0)
    ]
    objects = f"{data.num_objects} objects" + (f" ({', '.join(said)})" if said else "")
    print(
        f"{len(data.images)} images, {objects}, {len(data.categories)} categories, {data.num_crowds} crowds"
    )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _quiet_in_forks() if _is_command() else None)


def _is_command() -> bool:
    """Whether this process is the command, whose handler of SIGTERM is then ours."""
    return signal.getsignal(signal.SIGTERM) is _terminate


def _print_metrics(metrics: dict[str, Any]) -> None:
    from maskloss.training.metrics import labels

    for kind, label in labels().items():
        values = "  ".join(
            f"{key} {'none' if value is None else f'{value:.3f}'}" for key, value in metrics[kind].items()
        )
        print(f"{label:>8}: {values}")


def _refuse_to_overwrite(path: Path) -> None:
    if path.exists():
        raise InputError(f"{path}: is there already; name another --output")


def _free_name(stem: str, taken: set[str]) -> str:
    """Return a PNG's name that is not taken, of a length that every file system takes."""
    if len(os.fsencode(stem)) > _LONGEST_STEM:
        digest = hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]
        stem = os.fsencode(stem)[:_LONGEST_STEM].decode(errors="ignore") + f"-{digest}"
    name, number = f"{stem}.png", 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}.png"
    taken.add(name)
    return name


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    return "--" + option[2:].replace("-", "_") + equals + value


def _hyphenated(text: str) -> str:
    return re.sub(r"--\w+", lambda match: match.group().replace("_", "-"), text)


def _fail(error: object, code: int) -> NoReturn:
    print(one_line(f"maskloss: error: {error}"), file=sys.stderr)
    sys.exit(code)
