"""Who may do what: accounts, access keys, roles, policies, quotas, and credentials for what runs inside microVMs."""
