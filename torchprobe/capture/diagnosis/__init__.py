"""Evidence for diagnoses: what the optimizer holds and gets, what lies between output and loss, how modules are used."""
