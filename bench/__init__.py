"""What the collectives cost, beside what the wire allows and what others take. Needs a checkout.

`make bench` and its sisters run the programs; each prints a table and writes JSON and a PNG.
"""
