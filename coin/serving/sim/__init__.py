"""Simulation of serving: cost and latency, with the front end's own decisions on a virtual clock.

A query that fails has infinite latency, so that failing fast makes no policy look quick. The load is what own answers
alone take of the experts' capacity; what a policy asks on top is in the column ``forwards``. Effective accuracy is the
mean over answers, the experts' own and those that stand in; those that never came are wrong. ParM (Kosaian, Rashmi,
Venkataraman: *Parity Models*, SOSP 2019) codes over *queries* to replicas of one network; here the code is over
*models*, every one of which sees the query itself.
"""
