"""What a CUDA graph is, on a CPU."""

import torch


class Repeated:
    """A function that is called again on the same tensors, into the same tensor."""

    def __init__(self, function, arguments, output):
        self.function, self.arguments, self.output = function, arguments, output

    def replay(self):
        self.output.copy_(self.function(*self.arguments))


def repeated(learner, function, *arguments):
    """In the place of `CapturedLearner._captured`."""
    output = torch.zeros(2 if function == learner._step else ())
    return Repeated(function, arguments, output), output
