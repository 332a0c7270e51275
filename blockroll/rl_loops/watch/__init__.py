"""Whether rollouts go on being what they are said to be: signals, tests, a guard, and what a person sees."""
