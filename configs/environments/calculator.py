"""A tool for word problems: the model may calculate before it answers.

objective:
  name: grpo
  environment: configs/environments/calculator.py
  rewards: [numeric_answer, {name: environment, weight: 0.1}]
"""

import ast
import operator

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg,
}  # fmt: skip


def value_of(node: ast.AST) -> float:
    """Return the value of an expression of numbers; no names, calls or powers."""
    if isinstance(node, ast.Expression):
        return value_of(node.body)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.left), value_of(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.operand))
    raise ValueError("only numbers, + - * / // % and parentheses")


class Calculator:
    def reset(self, **columns):
        self.asked = 0

    def calculate(self, expression: str) -> str:
        """Calculate the value of an arithmetic expression.

        Args:
            expression: such as (12 + 7) * 3
        """
        self.asked += 1
        return f"{value_of(ast.parse(expression, mode='eval')):g}"

    def get_reward(self):
        """A little for asking once or twice, and nothing for asking on and on."""
        return float(1 <= self.asked <= 2)
