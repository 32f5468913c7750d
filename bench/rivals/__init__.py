"""Supervisors that replace a server without a gap, under the same load and faults."""
