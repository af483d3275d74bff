from metaformer_jax import cli

def main(cfg, workdir):
  print(cfg, workdir)

if __name__ == "__main__":
  cli.run(main)
