"""Programmes of steps through kinks, of random nets."""

import torch

import flowsim as fs
from flowsim.convex.programme import Programme

BALLS = {
    "l1": fs.L1(),
    "linf": fs.Linf(),
    "l2": fs.L2(),
    "l3": fs.Lp(3.0),
    "max l2": fs.Max(fs.L2()),
    "max l1, linf": fs.Max(
        {"layers.0.weight": fs.L1(), "layers.1.weight": fs.Linf()}, {"layers.1.weight": 2.0}
    ),
}


def bound(name, d, m):
    """A norm of the list on the weights of a net of m neurons with d inputs."""
    norm, net = BALLS[name], fs.MLP([d, m, 1])
    if isinstance(norm, fs.Max) and not isinstance(norm.parts, fs.norms.norm.Norm):
        names = [block.name for block in net.layout]
        norm = fs.Max(dict(zip(names, norm.parts.values(), strict=True)), {names[1]: 2.0})
    return norm.bind(net.layout)


def programme(norm, n, d, m, temperature, seed, *, eps=0.3, curb=0.0, twins=False):
    """A step of a random net from random weights, in units of its expected gain."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    if twins and n > 2:
        x[1], x[2] = x[0], 0.0
    w, a = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((m, d), (m, 1)))
    y = torch.sign(torch.randn(n, generator=g, dtype=torch.float64))
    z, force = w @ x.mT, a * y
    live = (force < 0) & (z.abs() <= eps * x.abs().sum(1))
    slope = torch.where(live, 0.0, force * (z > 0))
    ends = (y * z.clamp_min(0))[:, None, :]
    kinks = torch.where(live, -force, 0.0)
    q = (force * z.clamp_min(0)).sum(0)
    p = torch.softmax(-q, 0)
    h = torch.cat([((force * (z > 0) * p) @ x).flatten(), ends[:, 0] @ p])
    unit = eps * float(norm.dual(h)) + 1e-12
    rows = torch.randn(m, d + 1, d + 1, generator=g, dtype=torch.float64)
    offset = (q + (kinks * z.clamp_min(0)).sum(0)) / unit
    return Programme(
        x,
        torch.arange(n),
        slope * eps / unit,
        ends * eps / unit,
        kinks * eps / unit,
        live,
        z / eps,
        offset - offset.amin(),
        temperature,
        curb * rows.mT @ rows,
        0.1 * torch.randn(m, d + 1, generator=g, dtype=torch.float64),
    )
