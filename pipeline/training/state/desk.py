"""What is asked of a running training, between the driver, Ray Train's controller and rank 0.

Its actor's process imports this module and nothing else of ours, so that it costs no start.
"""


class Desk:
    """An actor of no cost: rank 0 looks there after every step."""

    def __init__(self) -> None:
        self.stop = self.save = self.over = False

    def order(self, stop: bool) -> None:
        self.save, self.stop = not self.over, self.stop or stop

    def orders(self) -> tuple[bool, bool]:
        """(save, stop)."""
        return self.save, self.stop

    def saved(self, over: bool) -> None:
        """over: the loop has ended and follows no more orders."""
        self.save, self.over = False, over
