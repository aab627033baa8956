"""What serving costs and how late it is, in simulation: the front end's own decisions on a virtual clock.

- Latency is the time from a query's arrival to its answer; p99.9 is what one query in a thousand exceeds. A query
  that fails has infinite latency, so that failing fast makes no policy look quick. All seeds' queries are taken
  together, and intervals are 95 % bootstrap intervals over seeds (over blocks of neighbouring queries with fewer than
  20 seeds): slow phases are rare and long, so that few seeds say little of the tail.
- `coin.serving.sim.profile.Redundancy` lists what may stand in. Memory is that of weights.
- The load is what own answers alone take up of the experts' capacity. What a policy asks on top costs on top: the
  column ``forwards`` says what that came to.
- Servers take what waits in one batch, as the real ones do; a spare's batches are of one network. Front ends take
  their own time for a query, one after the other, and every request takes a way there and back.
- Effective accuracy is the mean over answers: experts' own, decoded ones and a spare's, with the accuracies that the
  experiment's results or a measurement give; NaN where neither does. Answers that never came count as wrong.

ParM (Kosaian, Rashmi, Venkataraman: *Parity Models*, SOSP 2019) codes over *queries* to replicas of one network; here
the code is over *models*, every one of which sees the query itself.
"""
