"""MAML: the inner loop, the meta-gradient, one training step and evaluation (Algorithms 1 and 2 of the paper)."""

import functools
from collections.abc import Callable

import tensorflow as tf

from utils import Curve, InputError, Network, Tasks, Weights, check_choice

LEARNED_STEP_SIZES = ("none", "weight", "step")
QUERY_NORMS = ("batch", "support")


class MAML(tf.Module):
    """The meta-learned weights, the two optimizers' moments and the step: all that a step changes."""

    def __init__(
        self,
        network: Network,
        loss: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
        accuracy: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None = None,
        *,
        inner_lr: float,
        inner_steps: int,
        meta_lr: float = 0.001,
        first_order: bool = False,
        learn_inner_lr: str = "none",
        clip: float | None = None,
        seed: int = 0,
        parallel_tasks: int = 1,
        tasks_at_once: int = 1,
        all_sum: Callable[[tf.Tensor], tf.Tensor] | None = None,
    ):
        """Initial weights by `seed`, moments and step at 0.

        network: the model of one task.
        loss, accuracy: of one task's (outputs [n, O], labels [n, O]), scalars; no accuracy in regression.
        inner_lr: alpha, size of an inner step. inner_steps: J. meta_lr: beta, Adam's rate.
        first_order: the inner gradients are constants to the outer one (paper section 5.2).
        learn_inner_lr: "none"; or the step sizes are meta-learned too, and begin as alpha. "weight": one for each
            element of each adapted weight, the same in all updates (Meta-SGD, Li, Zhou, Chen, Li 2017). "step": one for
            each adapted weight and update (MAML++, Antoniou, Edwards, Storkey, ICLR 2019); after J updates the last
            goes on. They stand among the weights, as step_size_<name>.
        clip: bound on the absolute value of each element of the meta-gradient, or None.
        parallel_tasks: groups of tasks computed side by side; on a CPU one a core is fastest.
        tasks_at_once: G, the size of a group, whose tasks an operation computes together; 0: all tasks of a meta-batch.
            On a CPU one task a group is fastest.
        all_sum: adds up a vector [n], float64, over the processes that compute a step together, each on its own tasks;
            None: there is one process.

        Every public step is one graph, which is traced at its first call:
        train_step(tasks), pretrain_step(tasks), many_steps(...) and evaluate(tasks, steps, query_norm).
        Raises InputError where learn_inner_lr is none of LEARNED_STEP_SIZES.
        """
        super().__init__(name="maml")
        check_choice("learn_inner_lr", learn_inner_lr, LEARNED_STEP_SIZES)
        self.network, self.loss, self.accuracy = network, loss, accuracy
        self.inner_lr, self.inner_steps, self.first_order = inner_lr, inner_steps, first_order
        self.clip, self.parallel_tasks = clip, parallel_tasks
        self.tasks_at_once, self.all_sum = tasks_at_once, all_sum
        self.learn_inner_lr = learn_inner_lr
        values = network.init(seed)
        if network.adapted is None:
            self.network = network = network._replace(adapted=tuple(values))
        self.body_stays = network.body is not None and set(network.adapted) <= set(network.head)
        values = values | self._initial_step_sizes(values)  # a new dict: what init gave is the network's own
        self.weights = {name: tf.Variable(value, name=name) for name, value in values.items()}
        self.meta_optimizer = Adam(self.weights, meta_lr)
        self.pretrain_optimizer = Adam(self.weights, meta_lr)
        self.step = tf.Variable(0, dtype=tf.int64, name="step")  # outer steps done, pretraining included
        # Each graph belongs to its object. As a decorator of the class, tf.function holds the object weakly, and
        # MAML(...).train_step(tasks) would fail in one expression.
        self.train_step = tf.function(self._train_step, autograph=False)
        self.pretrain_step = tf.function(self._pretrain_step, autograph=False)
        self.many_steps = tf.function(self._many_steps, autograph=False, jit_compile=True)
        self.evaluate = tf.function(self._evaluate, autograph=False)

    @property
    def state(self) -> dict[str, object]:
        """All that a step changes, by the names that a checkpoint gives it."""
        return {
            "weights": self.weights,
            "meta_optimizer": self.meta_optimizer,
            "pretrain_optimizer": self.pretrain_optimizer,
            "step": self.step,
        }

    @property
    def tf1_names(self) -> dict[str, str]:
        """The names of the weights in checkpoints of the original."""
        return {name: name for name in self.weights} | (self.network.tf1_names or {})

    def adapt(self, weights: Weights, task: Tasks, steps: int) -> list[Weights]:
        """Runs the inner loop: `steps` gradient steps on the task's support set.

        A group of tasks is adapted as one task is: weights and tasks have a leading axis G. Each task's loss depends on
        its own weights alone, so the gradient of the sum of the losses [G] holds each task's own gradient.
        Returns 1 + steps dicts, the weights before and after each step; the first is `weights` itself. Where step sizes
        are learned for each update, a dict has those of the updates after it. Differentiable to `weights`.
        """
        path, (apply, support_x) = [weights], self._adapting_part(weights, task.support_x)
        if not self.body_stays:
            apply = self.network.inner_apply or apply
        for _ in range(steps):
            adapted = {name: path[-1][name] for name in self.network.adapted}
            with tf.GradientTape() as tape:
                tape.watch(adapted)
                loss = self.loss(apply(path[-1] | adapted, support_x), task.support_y)
            gradient = tape.gradient(loss, adapted, unconnected_gradients="zero")
            if self.first_order:
                gradient = tf.nest.map_structure(tf.stop_gradient, gradient)
            sizes, later = self._step_sizes(path[-1])
            path.append(path[-1] | later | {name: adapted[name] - sizes[name] * gradient[name] for name in adapted})
        return path

    def _adapting_part(self, weights, x):
        """The function that the updates change, and its inputs. A body that they leave alone is computed here, once."""
        if not self.body_stays:
            return self.network.apply, x
        return self.network.last_layer, self.network.body(weights, x)

    def _initial_step_sizes(self, weights):
        """Those that are learned, each alpha: of the shape of the weight, or [J]."""
        if self.learn_inner_lr == "none":
            return {}
        adapted = {name: weights[name] for name in self.network.adapted}
        shapes = {n: w.shape if self.learn_inner_lr == "weight" else [self.inner_steps] for n, w in adapted.items()}
        return {_size_of(n): tf.fill(shapes[n], tf.cast(self.inner_lr, w.dtype)) for n, w in adapted.items()}

    def _step_sizes(self, weights):
        """The size of the next update for each adapted weight, and what the step sizes are after it."""
        names = self.network.adapted
        if self.learn_inner_lr == "none":
            return dict.fromkeys(names, self.inner_lr), {}
        learned = {name: weights[_size_of(name)] for name in names}
        if self.learn_inner_lr == "weight":
            return learned, {}
        # [J], or [G, J] of a group. The first is the next one's, and the last stays when no other is left.
        sizes = {
            name: tf.reshape(each[..., 0], [*each.shape[:-1], *[1] * self.weights[name].shape.rank])
            for name, each in learned.items()
        }
        return sizes, {_size_of(name): tf.concat([each[..., 1:], each[..., -1:]], -1) for name, each in learned.items()}

    def scores(self, weights: Weights, support_x: tf.Tensor, query_x: tf.Tensor) -> tf.Tensor:
        """Computes the outputs of query inputs, each normalised by itself together with the support set.

        So an output does not depend on what else is asked, as it does where all query inputs are one batch (the paper's
        way). Only batch norm makes the two differ. Its statistics are others for every query input, so exact outputs
        take a batch of N * K + 1 inputs each.
        Args: weights after the updates; support_x [N * K, *D]; query_x [n, *D]; of a group, all with a leading axis G.
        Returns [n, O], or [G, n, O].
        """
        if not self.network.batch_statistics:
            return self.network.apply(weights, query_x)
        name, weight = next(iter(weights.items()))
        axis = weight.shape.rank - self.weights[name].shape.rank  # of the examples: 1 in a group of tasks, else 0

        def score(x):
            batch = tf.concat([support_x, tf.expand_dims(x, axis)], axis)
            return self.network.apply(weights, batch)[..., -1, :]

        def swapped(x):
            return tf.transpose(x, [1, 0, *range(2, x.shape.rank)]) if axis else x

        scores = tf.map_fn(
            score, swapped(query_x), fn_output_signature=query_x.dtype, parallel_iterations=self.parallel_tasks
        )
        return swapped(scores)

    def query_loss(self, weights: Weights, task: Tasks) -> tf.Tensor:
        """Computes what meta-training minimises: a task's loss on its query set after J updates. A scalar, or [G]."""
        adapted = self.adapt(weights, task, self.inner_steps)[-1]
        return self.loss(self.network.apply(adapted, task.query_x), task.query_y)

    def support_loss(self, weights: Weights, task: Tasks) -> tf.Tensor:
        """Computes what pretraining minimises: a task's loss on its support set before any update. A scalar, or [G]."""
        return self.loss(self.network.apply(weights, task.support_x), task.support_y)

    def _train_step(self, tasks: Tasks) -> tuple[tf.Tensor, tf.Tensor]:
        """Takes one step of Adam on the tasks' mean query_loss, clipped if asked for.

        Returns that loss and the norm of its gradient before the clip, scalars.
        """
        return self._step(tasks, pretrain=False)

    def _pretrain_step(self, tasks: Tasks) -> tuple[tf.Tensor, tf.Tensor]:
        """Takes one step of Adam, with moments of its own, on the tasks' mean support_loss, never clipped.

        Returns what train_step returns.
        """
        return self._step(tasks, pretrain=True)

    def _many_steps(self, tasks: Tasks, first: tf.Tensor, count: tf.Tensor, pretrain: bool) -> tf.Tensor:
        """Takes a train_step or pretrain_step on each of some meta-batches of a stack, as one compiled program.

        It is for tiny networks, whose operations cost less than Python and the start of an operation.

        Args:
            tasks: as Tasks, with one more leading axis: the stack.
            first, count: the first meta-batch that is used and how many are, integer scalars. They are tensors, so that
                one program serves them all.
            pretrain: take pretrain_steps.
        Returns the norm of the first step's gradient, a scalar.
        """

        def body(i, norm):
            meta_batch = tf.nest.map_structure(lambda x: x[first + i], tasks)
            _, this_norm = self._step(meta_batch, pretrain)
            return i + 1, tf.where(i == 0, this_norm, norm)

        start = tf.zeros([], count.dtype), tf.zeros([], tasks.query_x.dtype)
        return tf.while_loop(lambda i, _: i < count, body, start)[1]

    def _step(self, tasks, pretrain):
        tasks = self._checked(tasks)
        gradient, loss = self.mean_gradient(self.support_loss if pretrain else self.query_loss, tasks)
        norm = tf.linalg.global_norm(list(gradient.values()))
        if self.clip is not None and not pretrain:
            gradient = {name: tf.clip_by_value(g, -self.clip, self.clip) for name, g in gradient.items()}
        (self.pretrain_optimizer if pretrain else self.meta_optimizer).apply(gradient)
        self.step.assign_add(1)
        return loss, norm

    def _evaluate(self, tasks: Tasks, steps: int, query_norm: str = "batch") -> Curve:
        """Computes loss and accuracy of every task before and after each of `steps` updates. Changes nothing.

        query_norm: with what a query image is normalised under batch norm. "batch": its task's other query images, as
        in the paper (transductive). "support": the support set, see scores.
        Raises InputError where query_norm is none of QUERY_NORMS.
        """
        check_choice("query_norm", query_norm, QUERY_NORMS)
        tasks = self._checked(tasks)
        weights, dtype = self.values(), tasks.query_x.dtype

        def curve(weights, task):
            before, *after = self.adapt(weights, task, steps)
            scored = [(self.network.apply(before, task.support_x), task.support_y)]
            apply, query_x = self._adapting_part(weights, task.query_x)
            for adapted in after:
                if query_norm == "support":
                    outputs = self.scores(adapted, task.support_x, task.query_x)
                else:
                    outputs = apply(adapted, query_x)
                scored.append((outputs, task.query_y))
            losses = tf.stack([self.loss(*pair) for pair in scored], -1)
            if not self.accuracy:
                return Curve(losses, losses[..., :0])
            return Curve(losses, tf.stack([self.accuracy(*pair) for pair in scored], -1))

        return self.over_tasks(curve, weights, tasks, Curve(dtype, dtype))

    def mean_gradient(
        self, task_loss: Callable[[Weights, Tasks], tf.Tensor], tasks: Tasks
    ) -> tuple[Weights, tf.Tensor]:
        """Computes the gradient, to the meta-learned weights, of the mean loss over the tasks of all processes.

        Args: task_loss(weights, task), a scalar, or [G] of a group: query_loss or support_loss; the tasks of this
            process.
        Returns the gradient, by the weights' names and in their shapes, and the mean loss, a scalar.

        Each group differentiates its own losses inside the loop over groups: no backward pass through the loop, and
        the memory of one group a core.

        The sums are float64 and rounded once, to the weights' dtype, when all is added up. So the order in which tasks
        are added, on one core or on many processes, all but never matters. A sum of float32 numbers in float64 is exact
        in any order where the largest is less than 2^29 / T times the smallest that is not zero, since then the 53 bits
        of a float64 hold every partial sum. Elsewhere another order may move the sum by about 2^-53 of the largest
        partial sum. This changes the float32 result only where the sum lies that near to the middle between two
        float32 numbers. It is not impossible, but improbable: about one in 2^28 of such sums that do not cancel. Tiny
        networks (steps_a_call above 1), which one process computes in one fixed order, sum in their own dtype.
        """
        weights = self.values()

        def gradient_and_loss(weights, task):
            with tf.GradientTape() as tape:
                tape.watch(weights)
                loss = task_loss(weights, task)
            return tape.gradient(loss, weights, unconnected_gradients="zero"), loss

        outputs = tf.nest.map_structure(tf.TensorSpec.from_tensor, weights), tf.TensorSpec([], tasks.query_x.dtype)
        if self.network.steps_a_call > 1:
            # XLA merges the products of all tasks' gradients with the sum; in float64 it did not: 4.4 times slower.
            per_task = self.over_tasks(gradient_and_loss, weights, tasks, None)
            return tf.nest.map_structure(lambda x: tf.reduce_mean(x, 0), per_task)
        sums = self.sum_over_tasks(gradient_and_loss, weights, tasks, outputs)
        count = tf.cast(tf.shape(tasks.query_x)[0], tf.float64)
        if self.all_sum:
            *sums, count = _as_one_vector(self.all_sum, [*tf.nest.flatten(sums), count])
            sums = tf.nest.pack_sequence_as(outputs, sums)
        return tf.nest.map_structure(lambda total, like: tf.cast(total / count, like.dtype), sums, outputs)

    def values(self) -> Weights:
        """Reads the meta-learned weights."""
        return {name: tf.convert_to_tensor(variable) for name, variable in self.weights.items()}

    def _checked(self, tasks):
        """The tasks as tensors.

        Raises InputError where a part has another dtype or rank than the weights need, or another number of tasks or
        examples than the parts beside it. It runs while a graph is traced, so it costs a step nothing.
        """
        tasks = Tasks(*map(tf.convert_to_tensor, tasks))
        (dtype,) = {weight.dtype for weight in self.weights.values()}
        inputs = max(3, tasks.support_x.shape.rank, tasks.query_x.shape.rank)
        ranks = inputs, 3, inputs, 3
        for name, part, rank in zip(Tasks._fields, tasks, ranks, strict=True):
            if part.dtype != dtype:
                raise InputError(f"{name} is {part.dtype.name}, but the weights are {dtype.name}: convert it to that")
            if part.shape.rank != rank:
                raise InputError(
                    f"{name} has the shape {list(part.shape)}: tasks [T], examples [n] and at least one more axis are "
                    f"expected{', one-hot for classes' if name.endswith('y') else ''}"
                )
        for name, beside, axes in (
            ("support_y", "support_x", 2),
            ("query_x", "support_x", 1),
            ("query_y", "query_x", 2),
        ):
            shape, other = getattr(tasks, name).shape, getattr(tasks, beside).shape
            if not shape[:axes].is_compatible_with(other[:axes]):
                raise InputError(
                    f"{name} has the shape {list(shape)}, beside {beside} of {list(other)}: give the same tasks, and a "
                    "label or target for each example"
                )
        return tasks

    def over_tasks(self, function: Callable, weights: Weights, tasks: Tasks, outputs: object) -> object:
        """Computes function(weights, task) of each task, stacked [T, ...].

        outputs: the dtypes of what function returns, in its structure.
        """
        of_group, groups, size = self._groups(function, weights, tasks)
        if groups is None:
            return of_group(tasks)
        run = functools.partial(tf.map_fn, fn_output_signature=outputs, parallel_iterations=self.parallel_tasks)
        stacked = run(of_group, groups)
        if size == 1:
            return stacked
        return tf.nest.map_structure(lambda x: tf.reshape(x, [-1, *x.shape[2:]]), stacked)

    def sum_over_tasks(self, function: Callable, weights: Weights, tasks: Tasks, outputs: object) -> object:
        """Sums function(weights, task) over the tasks of this process, in float64. The memory does not grow with T.

        The groups are computed side by side, and only the additions are one after the other.
        outputs: the shapes and dtypes of what function returns of one task, in its structure.
        """
        of_group, groups, size = self._groups(function, weights, tasks)

        def total(values):
            return tf.nest.map_structure(lambda x: tf.reduce_sum(tf.cast(x, tf.float64), 0), values)

        if groups is None:
            return total(of_group(tasks))

        def body(i, sums):
            values = of_group(tf.nest.map_structure(lambda x: x[i], groups))
            values = tf.nest.map_structure(lambda x: tf.cast(x, tf.float64), values) if size == 1 else total(values)
            return i + 1, tf.nest.map_structure(tf.add, sums, values)

        count = tf.shape(tf.nest.flatten(groups)[0])[0]
        start = tf.constant(0), tf.nest.map_structure(lambda x: tf.zeros(x.shape, tf.float64), outputs)
        return tf.while_loop(lambda i, _: i < count, body, start, parallel_iterations=self.parallel_tasks)[1]

    def _groups(self, function, weights, tasks):
        """How the tasks lie on the machine: what computes a group, the groups [T / G, G, ...], and G.

        The tasks of a group are computed together. Where the network takes groups, function itself does it, with the
        weights [G, ...] of each task. A network of a user's own may know nothing of groups. A group of one is a task,
        without the axis G. The groups are None where all tasks are one group.
        """
        count = tf.nest.flatten(tasks)[0].shape[0]
        if count is None and self.tasks_at_once != 1:
            raise InputError("the number of tasks is unknown while the graph is traced: computing in groups needs it")
        size = self.tasks_at_once or count

        def of_task(task):
            return function(weights, task)

        def of_group(group):
            if not self.network.takes_groups:
                return tf.vectorized_map(of_task, group)
            return function({name: tf.broadcast_to(w, [size, *w.shape]) for name, w in weights.items()}, group)

        if self.network.steps_a_call > 1:
            return functools.partial(tf.vectorized_map, of_task), None, count
        if size == count > 1:
            return of_group, None, count
        if size == 1:
            return of_task, tasks, 1
        if count % size:
            raise InputError(f"{count} tasks are no whole groups of {size}: give another number of tasks at once")
        return of_group, tf.nest.map_structure(lambda x: tf.reshape(x, [-1, size, *x.shape[1:]]), tasks), size


def _as_one_vector(function, tensors):
    """Gives function the elements of all tensors as one vector [n]. Returns what it makes of them, in their shapes."""
    shapes = [tensor.shape for tensor in tensors]
    vector = function(tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0))
    parts = tf.split(vector, [shape.num_elements() for shape in shapes])
    return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def _size_of(name):
    """What the learned step sizes of a weight are called."""
    return f"step_size_{name}"


class Adam(tf.Module):
    """TensorFlow 1's Adam, by its own kernel: w -= rate * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)."""

    def __init__(self, weights: dict[str, tf.Variable], rate: float):
        super().__init__(name="adam")
        self.weights, self.rate = weights, rate
        self.m = {name: tf.Variable(tf.zeros_like(w), name=f"m_{name}") for name, w in weights.items()}
        self.v = {name: tf.Variable(tf.zeros_like(w), name=f"v_{name}") for name, w in weights.items()}
        self.updates = tf.Variable(0, dtype=tf.int64, name="updates")

    def apply(self, gradient: Weights) -> None:
        """Moves every weight once. b1 = 0.9, b2 = 0.999, eps = 1e-8: TensorFlow 1's defaults, as the original."""
        t = tf.cast(self.updates.assign_add(1), tf.float32)
        for name, weight in self.weights.items():
            tf.raw_ops.ResourceApplyAdam(
                var=weight.handle,
                m=self.m[name].handle,
                v=self.v[name].handle,
                beta1_power=tf.cast(tf.pow(0.9, t), weight.dtype),
                beta2_power=tf.cast(tf.pow(0.999, t), weight.dtype),
                lr=tf.constant(self.rate, weight.dtype),
                beta1=tf.constant(0.9, weight.dtype),
                beta2=tf.constant(0.999, weight.dtype),
                epsilon=tf.constant(1e-8, weight.dtype),
                grad=gradient[name],
            )
