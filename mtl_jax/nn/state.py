"""State: arrays of a module that training changes and no optimizer touches."""

from flax import nnx


class State(nnx.Variable):
    """Running moments, centres of clusters, a schedule's constant: saved with the model, never differentiated.

    A module assigns the next value while it trains (``self.mean[...] = new``, where ``context.train``) and reads the stored
    one in evaluation. The train step computes on a copy of the module and takes the assigned values over with the update
    that they belong to; a step that is skipped leaves them as they were.
    """
