"""Hessian-vector products of a policy's losses, hand-written in NumPy: they take most of an outer step.

The policy has two hidden layers of ReLUs. X is the observations with a column of ones for the bias, U_l the weights w_l
with the biases b_l as last row, and D_l is 1 where a unit is active, else 0. The means m of n transitions are

  Z = [D_1 * (X U_1), 1],   H = [D_2 * (Z U_2), 1],   m = H U_3        ([.., 1]: a column of ones; *: element-wise)

Away from the kinks D is constant, so m is linear in each U_l. Along a direction dU, with J_a = dm_a / d(X U_1),

  m'_a = H dU_3 + (D_2 * (Z dU_2)) w_3 + sum over d of X_d (J_a dU_1^T)_d                                      (1)

costs one product of [n, 100] by [100, 100]. So does its transpose, which maps r [n, A] to

  H^T r  (U_3),   Z^T (D_2 * (r w_3^T))  (U_2),   sum over a of (X r_a)^T J_a  (U_1)                            (2)

A loss with slopes s = dL/dm [n, A] adds the curvature of the network: the second derivatives of sum(s * m). This is a
polynomial in the weights, linear in each layer's. Its coefficients are sums over the transitions,

  Q_akdj = sum over n of s_a D_2k D_1j X_d,    R_ak = sum over n of s_a D_2k
  sum(s * m) = sum of w3_ka w2_jk U1_dj Q_akdj + sum of w3_ka b2_k R_ak + linear terms                         (3)

and are computed once for all products. A Hessian-vector product then costs two products of [n, 100] by [100, 100];
autodiff needs nine or more.
"""

from typing import NamedTuple

import numpy as np

Weights = dict[str, np.ndarray]


class Curvature(NamedTuple):
    """What the Hessian of a loss over one task's n transitions needs. K is the width of a hidden layer."""

    weights: Weights
    x: np.ndarray  # X [n, O + 1]
    z: np.ndarray  # Z [n, K + 1]
    h: np.ndarray  # H [n, K + 1]
    active: np.ndarray  # D_2 [n, K]
    jacobian: np.ndarray  # J [A, n, K]
    # Second derivatives of the loss in the means and log standard deviations, per transition and action. std_std is
    # summed over transitions. All others are 0.
    mean_mean: np.ndarray  # [n, A]
    mean_std: np.ndarray  # [n, A]
    std_std: np.ndarray  # [A]
    network: "Network | None"  # None if the slopes are 0


class Network(NamedTuple):
    """The coefficients of (3): with_l is Q times layer l's weights, summed over the indices no other layer has."""

    with_1: np.ndarray  # [A, K, K]  a k j
    with_2: np.ndarray  # [A * K, (O + 1) * K]  ak dj
    with_3: np.ndarray  # [O + 1, K, K]  d k j
    bias_2: np.ndarray  # R [A, K]


def inner_loss(weights: Weights, observations: np.ndarray, actions: np.ndarray, c: np.ndarray) -> Curvature:
    """Return the curvature of policy.policy_gradient, sum of c (e^2 / 2 + log std) with e = (action - m) / std.

    observations: [n, O]. actions: [n, A]. c: [n], share times advantage.
    """
    scale, c = np.exp(-weights["log_std"]), c[:, None]
    at, d1, means = _linearized(weights, observations)
    e = (actions - means) * scale
    slopes = -c * e * scale
    u1, w2, w3 = _with_bias(weights, 1), weights["w2"], weights["w3"]
    left = np.concatenate([at.active * slope[:, None] for slope in slopes.T], 1)  # n ak
    right = np.concatenate([d1 * x[:, None] for x in at.x.T], 1)  # n dj
    q = (left.T @ right).reshape(w3.shape[1], w3.shape[0], *u1.shape)  # a k d j
    network = Network(
        with_1=np.sum(q * u1, 2),
        with_2=(q * w2.T[:, None]).reshape(left.shape[1], right.shape[1]),
        with_3=np.einsum("akdj,ka->dkj", q, w3),
        bias_2=np.sum(left, 0).reshape(q.shape[:2]),
    )
    return at._replace(
        mean_mean=c * scale**2, mean_std=2 * c * e * scale, std_std=2 * np.sum(c * e**2, 0), network=network
    )


def fisher(weights: Weights, observations: np.ndarray, shares: np.ndarray) -> Curvature:
    """Return the curvature of the mean divergence from the policy with these weights.

    observations: [n, O]. shares: [n], the weights of the mean; they sum to 1.
    """
    at, _, means = _linearized(weights, observations)
    precision = np.exp(-2 * weights["log_std"])
    return at._replace(
        mean_mean=shares[:, None] * precision, mean_std=np.zeros_like(means), std_std=2 * np.ones_like(precision)
    )


def product(at: Curvature, direction: Weights) -> Weights:
    """Return the Hessian times the direction."""
    d1, d2, d3 = (_with_bias(direction, layer) for layer in (1, 2, 3))
    ds, w3 = direction["log_std"], at.weights["w3"]

    second = at.z @ d2
    second *= at.active
    means = at.h @ d3 + second @ w3 + np.sum(at.x * (at.jacobian @ d1.T), -1).T  # (1)
    r = at.mean_mean * means + at.mean_std * ds
    back = r @ w3.T
    back *= at.active
    g1 = (at.x * r.T[:, :, None]).reshape(-1, len(d1)).T @ at.jacobian.reshape(-1, at.jacobian.shape[-1])  # (2)
    g2, g3 = at.z.T @ back, at.h.T @ r
    if at.network:
        with_1, with_2, with_3, bias_2 = at.network
        dw2, db2, dw3 = direction["w2"].T, direction["b2"], direction["w3"].T  # k j, k, a k
        g1 += np.sum(with_3 * dw2, 1) + (dw3.reshape(-1) @ with_2).reshape(d1.shape)
        g2[:-1] += (np.sum(with_1 * dw3[:, :, None], 0) + np.sum(with_3 * d1[:, None], 0)).T
        g2[-1] += np.sum(dw3 * bias_2, 0)
        g3[:-1] += (np.sum(with_1 * dw2, 2) + (with_2 @ d1.reshape(-1)).reshape(dw3.shape) + bias_2 * db2).T
    log_std = np.sum(at.mean_std * means, 0) + at.std_std * ds
    return {"w1": g1[:-1], "b1": g1[-1], "w2": g2[:-1], "b2": g2[-1], "w3": g3[:-1], "b3": g3[-1], "log_std": log_std}


def _linearized(weights, observations):
    """Return a Curvature without a loss, D_1 [n, K] and the means [n, A]."""
    x = _with_ones(observations)
    first = x @ _with_bias(weights, 1)
    d1 = (first > 0).astype(x.dtype)
    z = _with_ones(np.maximum(first, 0, out=first))
    second = z @ _with_bias(weights, 2)
    d2 = (second > 0).astype(x.dtype)
    h = _with_ones(np.maximum(second, 0, out=second))
    jacobian = np.stack([(d2 * w3) @ weights["w2"].T for w3 in weights["w3"].T])
    jacobian *= d1
    return Curvature(weights, x, z, h, d2, jacobian, None, None, None, None), d1, h @ _with_bias(weights, 3)


def _with_bias(weights, layer):
    return np.concatenate([weights[f"w{layer}"], weights[f"b{layer}"][None]])


def _with_ones(x):
    return np.concatenate([x, np.ones_like(x[:, :1])], 1)
