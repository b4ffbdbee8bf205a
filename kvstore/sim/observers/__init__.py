"""Invariants that are checked while a simulation runs, after each step of each node.

Nothing is polled that can be watched: a core's work as it is carried out, batches as they become durable, messages and
answers as they leave, entries as they are applied. What is kept once for the whole cluster (the ghost) is compared with
what each replica does. What is broken becomes a problem of the cluster; the run goes on.

| family | invariants |
|---|---|
| consensus.py | Raft's own: elections, logs, commits, votes and terms across restarts |
| contents.py | I16, I17, I18, RC1: what replicas hold |
| oracle.py | I9; of I15, what may be collected |
| transactions.py | I1 to I5, I7, I8, I10 to I15, I19, I20, I22, FG2: what the logs say |
| states.py | I24: what the workloads promise of the whole database, at each version, once the run is over |
| locks.py | I21: the lock tables of leaders |
| answers.py | I6, I8, I11, I12, W1, FG2: what is told |
| hooks.py | how they are attached to nodes |
"""

from kvstore.sim.observers.hooks import Observers
from kvstore.sim.observers.report import MISTAKES_MAX

__all__ = ["MISTAKES_MAX", "Observers"]
