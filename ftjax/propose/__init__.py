"""`ftjax init`: proposes a configuration from the data and the machine, and says why."""
