"""The world of scenes: a second testbed, in which a model loses words. Its parts are imported one by one."""
