"""Links of a given rate, in user space, for tests and demonstrations without root.

`python -m test.limits IP TARGET_IP TARGET_PORT BITS_PER_S` is a link in front of one neuron: the
neuron publishes the link's port instead of its own, and knows nothing else of it. None of this is
reachable from the shipped programs.
"""
