"""Evidence for diagnoses: what optimizers hold and get, what lies between output and loss, how modules are used."""
