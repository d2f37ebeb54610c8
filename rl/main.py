"""Reinforcement learning by MAML (paper section 5.3): 2D navigation and the half-cheetah.

  Train  python rl/main.py --env=point --iterations=100 --logdir=logs/rl/point
  Test   the same command plus --train=False, or python rl/main.py --run=logs/rl/point/<run> --train=False

docs/rl.md compares the returns with the authors'. experiments/rl_*.sh contain the commands for them.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one step of the rollouts is too small for more threads
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root instead of rl/

import devices  # isort: skip  before TensorFlow, which reads the environment it sets

import numpy as np
from absl import flags, logging
from tqdm import tqdm

import runs
from cluster import stopping_on_signals
from files import InputError, os_error, printable, read_json, user_path, write_whole, writing
from maml import InnerLoop
from recipe import EXAMPLES, ITERATIONS, Range
from report import Events, scalars, tell
from rl.environments import ENVIRONMENTS, Environment
from rl.policy import gaussian, policy_gradient
from rl.trpo import BACKTRACKS, MetaTRPO
from utils import statistics

FLAGS = flags.FlagValues()  # separate from those of the supervised main.py, which has some of the same names
flags.DEFINE_bool("help", False, "Show this help and exit.", short_name="h", flag_values=FLAGS)
flags.DEFINE_enum(
    "env",
    "point",
    list(ENVIRONMENTS),
    "Tasks. point: goals in the plane; cheetah_direction: run forward or backward; cheetah_speed: run at a goal speed.",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "baseline",
    None,
    ["random", "pretrained", "oracle"],
    "A baseline instead of MAML. random: the initial policy (test only); pretrained: one policy for all tasks; oracle: "
    "the same, but it observes the goal.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("iterations", 100, "Outer steps. Paper's code: 100; cheetah_speed: 800.", flag_values=FLAGS)
flags.DEFINE_integer("meta_batch_size", 40, "Tasks per outer step. Paper's code: 40.", flag_values=FLAGS)
flags.DEFINE_integer(
    "num_rollouts", 20, "Parallel rollouts per task, before and after the update. Paper: 20.", flag_values=FLAGS
)
flags.DEFINE_float(
    "update_lr",
    None,
    "Inner learning rate alpha. Default (the paper's code): 0.5 for point, 0.1 for cheetah.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "meta_step_size",
    None,
    "Bound on an outer step's mean KL divergence, in nats. Default (the paper's code): 0.01; cheetah_direction: 0.02.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "run",
    None,
    "A run folder to resume, or to test with --train=False. Its flags.json sets the other flags; --iterations may be "
    "higher.",
    flag_values=FLAGS,
)
flags.DEFINE_string("logdir", "logs/rl", "Folder that holds the run folders.", flag_values=FLAGS)
flags.DEFINE_bool("train", True, "Train. --train=False: test.", flag_values=FLAGS)
flags.DEFINE_bool("resume", True, "Resume from the run folder's latest checkpoint.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Seed of the initial weights, the goals and the rollouts.", flag_values=FLAGS)
flags.DEFINE_integer(
    "save_interval", 10, "Iterations between checkpoints. The last ten and the best are kept.", flag_values=FLAGS
)
flags.DEFINE_integer("threads", 0, "Tasks to run in parallel, one per core. 0: all cores.", flag_values=FLAGS)

for _name, _range in {
    "iterations": ITERATIONS,
    "meta_batch_size": EXAMPLES,
    "num_rollouts": EXAMPLES,
    "save_interval": ITERATIONS._replace(least=1),
    "threads": Range(0, 1024),
}.items():
    flags.register_validator(_name, _range.__contains__, f"must be {_range}", flag_values=FLAGS)
for _name in ("update_lr", "meta_step_size"):
    flags.register_validator(
        _name, lambda value: value is None or 0 < value < math.inf, "must be a number above 0", flag_values=FLAGS
    )
flags.register_validator("seed", lambda value: 0 <= value < 2**32, "must be 0 to 2^32 - 1", flag_values=FLAGS)

# (alpha, KL bound), from the scripts of cbfinn/maml_rl.
DEFAULTS = {"point": (0.5, 0.01), "cheetah_direction": (0.1, 0.02), "cheetah_speed": (0.1, 0.01)}
IDENTITY = "env baseline iterations meta_batch_size num_rollouts update_lr meta_step_size seed".split()
PRODUCT = "finite_difference"  # of the outer step; flags.json has it as "product"
PRINT_INTERVAL = 10  # iterations
AVERAGED = 10  # iterations: the best checkpoint has the highest return, averaged over this many

# The authors' tests (test_maml_point.py and the like).
TEST_GOALS, TEST_GOALS_SEED = 40, 1
TEST_TRANSITIONS = 4000  # per goal, before each update
TEST_UPDATES = 4
LATER_UPDATES = 0.5  # size of each update after the first, in units of alpha
KEPT_GOALS, KEPT_ROLLOUTS = 4, 3  # paths kept in results.json for the figure


def main() -> None:
    """Train or test, as the flags say."""
    logging.set_verbosity(logging.WARNING)
    cores = FLAGS.threads or devices.cores()
    devices.start(cores)
    identity = run_identity()
    run = run_folder(identity)
    environment = ENVIRONMENTS[FLAGS.env](oracle=FLAGS.baseline == "oracle", threads=cores)
    learner = build(identity, environment, cores)
    if not FLAGS.train:
        test(run, learner, identity, environment)
    elif FLAGS.baseline == "random":
        raise InputError("--baseline=random: is only for testing; give --train=False")
    else:
        with run.locked():
            train(run, learner, identity, environment)


def run_identity() -> dict:
    """Return the flags that the run's numbers depend on. Set the environment's defaults first."""
    alpha, bound = DEFAULTS[FLAGS.env]
    FLAGS.set_default("update_lr", alpha)
    FLAGS.set_default("meta_step_size", bound)
    return {name: FLAGS[name].value for name in IDENTITY}


def take_run(folder: Path) -> None:
    """Set the flags from a run folder's flags.json.

    Raise InputError if a flag other than --iterations contradicts it.
    """
    try:
        record = read_json(folder / "flags.json", dict, "restore a copy, or name another run")
    except FileNotFoundError:
        raise InputError(f"--run={folder}: has no flags.json; name a run folder") from None
    for name in IDENTITY:
        flag = FLAGS[name]
        if flag.present and name != "iterations" and flag.value != record.get(name):
            raise InputError(f"--{name}={flag.value}: the run in {folder} has {record.get(name)}; leave it out")
        if not (flag.present and name == "iterations"):
            flag.value = record.get(name)


def asked_for(arguments: list[str]) -> dict | None:
    """Return the identity of the run that a command line starts, or None for invalid flags or --help.

    In the latter cases rl/main.py prints the error or the help.
    """
    try:
        if FLAGS(["rl/main.py", *arguments]) != ["rl/main.py"] or FLAGS.help:
            return None
    except flags.Error:
        return None
    return run_identity()


def run_folder(identity: dict) -> runs.Run:
    """Return the run with these flags, e.g. <logdir>/point.mbs_40.rollouts_20.updatelr0.5.kl0.01.seed1."""
    if FLAGS.run:
        return runs.Run(user_path(FLAGS.run))
    name = "{env}.mbs_{meta_batch_size}.rollouts_{num_rollouts}.updatelr{update_lr}.kl{meta_step_size}".format(
        **identity
    )
    if identity["baseline"]:
        name += f".{identity['baseline']}"
    if identity["seed"]:
        name += f".seed{identity['seed']}"
    return runs.Run(user_path(FLAGS.logdir) / name)


def build(identity: dict, environment: Environment, cores: int) -> MetaTRPO:
    """Return the learner with its initial weights."""
    network = gaussian(environment.observation_size, environment.action_size)
    steps = 0 if identity["baseline"] in ("pretrained", "oracle") else 1
    inner = InnerLoop(network, policy_gradient, alpha=identity["update_lr"], steps=steps)
    return MetaTRPO(inner, bound=identity["meta_step_size"], seed=identity["seed"], cores=cores)


def recorded_product(run: runs.Run) -> str:
    """Return how a run's Fisher products were computed. Older runs did not record it; theirs are exact."""
    try:
        recorded = read_json(run.folder / "flags.json", dict, "restore a copy, or choose another --logdir")
    except FileNotFoundError:
        recorded = {}
    return recorded.get("product", "exact")


def return_tag(learner: MetaTRPO) -> str:
    """Return the tag of the training tasks' return after the update, if there is one."""
    return "Post-update_return__step_1" if learner.inner.steps else "Pre-update_return"


def train(run: runs.Run, learner: MetaTRPO, identity: dict, environment: Environment) -> None:
    """Take the remaining outer steps of a run."""
    run.check(identity, {}, FLAGS.resume)
    if run.iterations():
        if (product := recorded_product(run)) != PRODUCT:
            raise InputError(
                f"{run.folder}: was trained with the {printable(product)} Fisher product, so it can only be tested; "
                "choose another --logdir"
            )
        print("Restoring model weights from", run.restore_newest(learner))
    start, total = int(learner.step), FLAGS.iterations
    if start >= total:
        print(f"Nothing left to do: {start} of {total} iterations are done. To train longer, raise --iterations.")
        return
    identity = identity | {"product": PRODUCT}
    run.record(identity)
    recorded = scalars(run.folder).get(f"metatrain_{return_tag(learner)}", {})
    after_update = {iteration: value for iteration, value in recorded.items() if iteration < start}
    print(f"Run folder {run.folder}, iterations {start} to {total - 1}.")
    print("Printed: return before and after the update, averaged over rollouts and tasks.", flush=True)
    with (
        stopping_on_signals() as stop,
        Events(run.folder, start) as events,
        tqdm(total=total, initial=start, unit=" iterations", disable=None) as progress,
    ):
        events.flags(start, identity)
        history = []
        for iteration in range(start, total):
            values = outer_iteration(learner, environment, iteration)
            history.append(values)
            after_update[iteration] = np.float32(values[return_tag(learner)])  # rounded as in the events
            events.scalars(iteration, {f"metatrain_{tag}": value for tag, value in values.items()})
            progress.update()
            if iteration % PRINT_INTERVAL == 0 or iteration == total - 1:
                returns = ", ".join(f"{value:.4g}" for tag, value in values.items() if "return" in tag)
                tell(f"Iteration {iteration}: {returns}")
            last, regular = iteration == total - 1, (iteration + 1) % FLAGS.save_interval == 0
            recent = [after_update.get(i) for i in range(iteration - AVERAGED + 1, iteration + 1)]
            if regular and None not in recent:  # a stop does not add a candidate
                run.validation = run.validation.then(iteration, float(np.mean(recent)), AVERAGED)
            if last or stop.reason or regular:
                prefix = run.save(learner)
            if stop.reason and not last:
                print(f"Stopped by {stop.reason}, saved in {prefix}. To continue: python rl/main.py --run={run.folder}")
                sys.exit(128 + signal.Signals[stop.reason])
    print(f"Done: {total} iterations, the last saved in {prefix}.")
    parts = {tag: np.median([values[tag] for values in history]) for tag in history[0] if tag.endswith("_seconds")}
    listed = ", ".join(f"{tag.removesuffix('_seconds').replace('_', ' ')} {value:.2f}" for tag, value in parts.items())
    print(f"Median seconds per iteration: {listed}.")


def outer_iteration(learner: MetaTRPO, environment: Environment, iteration: int) -> dict[str, float]:
    """Take one outer step and return its TensorBoard scalars. It depends only on weights, seed and iteration."""
    random = np.random.default_rng((FLAGS.seed, iteration, 0))
    began = time.perf_counter()
    goals = environment.goals(random, FLAGS.meta_batch_size)
    batch, rollouts = learner.gather(environment, goals, FLAGS.num_rollouts, random)
    seconds = {"rollouts": time.perf_counter() - began}
    update = learner.outer_step(batch)
    values = {"Pre-update_return": rollouts[0].mean_returns().mean()}
    values[return_tag(learner)] = rollouts[-1].mean_returns().mean()
    return {
        **{tag: float(value) for tag, value in values.items()},
        "divergence": update.divergence,
        "surrogate_gain": update.surrogate_before - update.surrogate,
        "backtracks": update.backtracks,
        "step_refused": float(update.backtracks == BACKTRACKS),
        **{f"{part}_seconds": value for part, value in {**seconds, **update.seconds}.items()},
    }


def test(run: runs.Run, learner: MetaTRPO, identity: dict, environment: Environment) -> None:
    """Print the returns on the authors' test goals before and after updates, and write them to results.json.

    The last checkpoint is tested, and the best one in training, under "best".
    """
    trained = FLAGS.baseline != "random"
    if trained:
        run.checkpoint()
        run.check_flags(identity, {}, training=False)
        identity = identity | {"product": recorded_product(run)}
        print("Restoring model weights from", run.restore_newest(learner))
    runs.check_writable(run.folder, "--logdir")
    iterations, validation = int(learner.step) if trained else 0, run.validation
    goals = environment.goals(np.random.RandomState(TEST_GOALS_SEED), TEST_GOALS)
    entry = {
        "run": run.folder.name,
        "flags": identity | {"iterations": iterations},
        "metric": "return, the undiscounted sum of rewards, mean over rollouts",
        "goals": TEST_GOALS,
        "transitions_at_least": TEST_TRANSITIONS,
        **measured(learner, environment, goals),
    }
    if validation.best in run.iterations():
        print(f"The best checkpoint in training is that of iteration {validation.best}: {validation.accuracy:.4g}.")
        best = {"iterations": validation.best + 1, "training_return": validation.accuracy}
        if validation.best + 1 != iterations:
            run.restore(learner, run.prefix(validation.best))
            measurements = measured(learner, environment, goals)
            best |= {key: measurements[key] for key in ("results", "returns")}
        entry["best"] = best
    with writing(run.folder):
        write_whole(run.folder / "results.json", lambda file: file.write(json.dumps(entry).encode()))
    print(f"Written: {run.folder / 'results.json'}.")


def measured(learner: MetaTRPO, environment: Environment, goals: np.ndarray) -> dict:
    """Print the learner's returns for the goals, and return them as entries of results.json."""
    random = np.random.default_rng((0, 0, 1))  # the third number is 0 in training
    count = TEST_TRANSITIONS // environment.horizon
    sizes = [] if FLAGS.baseline == "oracle" else [1] + [LATER_UPDATES] * (TEST_UPDATES - 1)
    curve = list(learner.curve(environment, goals, count, sizes, random))
    returns = np.stack([rollouts.mean_returns() for rollouts in curve], 1)
    means, stds, ci95 = statistics(returns)
    print("Return after 0, 1, ... updates, with its 95% confidence interval over goals:")
    print(", ".join(f"{mean:.2f} +- {half:.2f}" for mean, half in zip(means, ci95, strict=True)))
    entry = {
        "results": [
            {
                "updates": j,
                "mean": float(means[j]),
                "ci95": float(ci95[j]),
                "std": float(stds[j]),
                "rollouts_of_a_goal": float(rollouts.ends.sum(1).mean()),
                # Excludes rollouts that start after one reaches the goal: easy tasks have more of them.
                "mean_of_first_rollouts": float(rollouts.mean_returns(first=True).mean()),
            }
            for j, rollouts in enumerate(curve)
        ],
        "returns": np.round(returns, 3).tolist(),  # [goal, update]
    }
    if FLAGS.env == "cheetah_direction":
        forward = goals[:, 0] >= 1
        for direction, chosen in (("forward", forward), ("backward", ~forward)):
            means, _, ci95 = statistics(returns[chosen])
            print(f"{direction}: " + ", ".join(f"{m:.2f} +- {half:.2f}" for m, half in zip(means, ci95, strict=True)))
            for result, mean, half in zip(entry["results"], means, ci95, strict=True):
                result[direction] = {"mean": float(mean), "ci95": float(half)}
    if FLAGS.env == "point":
        entry["goals_of_paths"] = np.round(goals[:KEPT_GOALS], 3).tolist()
        entry["paths"] = [  # [update, goal, rollout, step, coordinate]
            [rollouts.paths(goal, KEPT_ROLLOUTS) for goal in range(KEPT_GOALS)] for rollouts in curve
        ]
    return entry


def program(argv: list[str]) -> None:
    """Run main. Exit with one line for invalid flags, invalid input, or an OS error."""
    try:
        unexpected = FLAGS(argv)[1:]
        if FLAGS.help:
            print(__doc__, FLAGS.get_help(), sep="\n")
            return
        if unexpected:
            raise InputError(f"{unexpected[0]}: is not a flag; write --name=value")
        if FLAGS.run:
            take_run(user_path(FLAGS.run))
        main()
        sys.stdout.flush()
    except flags.Error as error:
        sys.exit(f"rl/main.py: {' '.join(str(error).split())} (python rl/main.py --help lists the flags)")
    except (InputError, OSError) as error:
        sys.exit(f"rl/main.py: {os_error(error) if isinstance(error, OSError) else error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    program(sys.argv)
