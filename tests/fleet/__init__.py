"""Hosts with networks of their own, sshd, HAProxy and Ansible: `make test-fleet`."""
