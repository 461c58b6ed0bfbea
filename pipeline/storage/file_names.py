"""Names of the files and folders in a run directory and in its stages, spelled here and nowhere else.

A run directory holds recipe.yaml and one directory per stage, named after the stage.
"""

RECIPE_FILE = "recipe.yaml"  # the resolved recipe: of the chain in a run directory, of one stage in a stage directory

# In a stage directory
JOURNAL_FILE = "journal.jsonl"  # every event, one JSON object a line
DATA_FILE = "data.json"  # SHA-256 of the data that the stage was started with
INIT_FILE = "init.json"  # path and SHA-256 of the foreign weights that the stage was started with
LARGE_KERNELS_FILE = "large_kernels.json"  # the measured choice of kernel per shape
CHECKPOINTS_FILE = "checkpoints.json"  # where the checkpoints are, and the id that marks that place
ATTEMPTS_FILE = "attempts.jsonl"  # the attempts as a list, for people
ATTEMPTS_FOLDER = "attempts"  # NUMBER.json, NUMBER.heartbeat, NUMBER.outcome.json (see pipeline.stage.attempts)
CHECKPOINTS_FOLDER = "checkpoints"  # see pipeline.checkpoint
HEALTH_FOLDER = "health"  # heartbeats and stacks of the ranks, per attempt (see pipeline.health.watchdog)
LOGS_FOLDER = "logs"  # output of the ranks of a local launch
PICTURES_FOLDER = "pictures"  # reconstructions
PROFILES_FOLDER = "profiles"  # requests of `fcmae profile`, and traces of the ranks (see tracking.step_profiler)
PROFILE_REQUEST_FILE = "request.json"  # in that folder
EVALUATIONS_FOLDER = "evaluations"  # results of `fcmae evaluate` with the weights of this stage, for the report
CURVES_FILE = "curves.png"  # plot of the journal
WEIGHTS_FILE = "weights.safetensors"  # the weights that are handed on
MASKS_FILE = "masks.safetensors"  # the sparsity masks, if the recipe exports them
RESULT_FILE = "result.json"  # metrics, hashes and verdict of a finished stage
SHARED_FILE = "shared.json"  # what studies recognise an equal stage by (see tools.study.shared_stages)
DONE_FILE = "DONE"  # written last: the stage is finished, and these are its weights

# What a stage that has made no step may hold, the recipe last, as it marks the folder as a stage
IN_STAGES = (
    JOURNAL_FILE, DATA_FILE, INIT_FILE, LARGE_KERNELS_FILE, CHECKPOINTS_FILE, ATTEMPTS_FILE, ATTEMPTS_FOLDER,
    CHECKPOINTS_FOLDER, HEALTH_FOLDER, LOGS_FOLDER, PICTURES_FOLDER, PROFILES_FOLDER, CURVES_FILE, RESULT_FILE,
    SHARED_FILE, RECIPE_FILE,
)  # fmt: skip
