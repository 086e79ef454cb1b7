"""What measures the implementations: records, checks, timers and the plots drawn from their results.

Reads `spec/` and `implementations/`; nothing in those two reads this.
"""
