"""A game of two turns: the model guesses a number, hears whether it is too low or too high, and guesses again.

    objective:
      name: grpo
      environment: configs/environments/guess.py

Rows: {"prompt": "Guess my number from 1 to 20. Reply with a number.", "secret": 7}
"""

import re


class Guess:
    def reset(self, secret, **columns):
        self.secret, self.guesses = int(secret), []

    def step(self, answer):
        found = re.search(r"-?\d+", answer)
        self.guesses.append(int(found[0]) if found else None)
        guess = self.guesses[-1]
        if guess == self.secret or len(self.guesses) == 2:
            return None
        if guess is None:
            return "That is no number. Guess again."
        return "Too low. Guess again." if guess < self.secret else "Too high. Guess again."

    def get_reward(self):
        """1 for the number, and something for the second guess being nearer than the first."""
        if self.secret in self.guesses:
            return 1.0
        if len(self.guesses) == 2 and None not in self.guesses:
            first, second = (abs(guess - self.secret) for guess in self.guesses)
            return 0.3 if second < first else 0.0
        return -0.5
