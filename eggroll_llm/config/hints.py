"""Guess the intended name behind an unknown one: a typo, another tool's word, or the wrong table."""

import difflib
from collections.abc import Iterable, Sequence

_WORDS_ELSEWHERE = (
    # What TRL, verl, transformers, unsloth and the code of the papers write, without punctuation: what it is here.
    ("lr alpha stepsize", "es.learning_rate grpo.learning_rate"),
    ("lrschedule lrscheduler lrschedulertype", "es.learning_rate_schedule grpo.learning_rate_schedule"),
    ("std stddev noisestd noisescale", "es.sigma"),
    ("popsize populationsize npopulation nmembers", "es.population"),
    ("numgenerations groupsize rolloutsperexample rolloutn n", "sampling.samples_per_prompt es.population"),
    ("batchsize trainbatchsize perdevicetrainbatchsize", "sampling.prompts_per_step"),
    ("maxnewtokens maxcompletionlength maxresponselength maxlength maxgenlength", "sampling.max_tokens max-tokens"),
    ("maxseqlength maxlen contextlength", "engine.max_model_len"),
    ("epochs epoch numepochs numtrainepochs totalepochs maxsteps trainsteps numsteps totalsteps", "steps"),
    ("iterations iters numiterations generations numupdates updates", "steps"),
    ("time maxtime duration hours", "minutes"),
    ("modelname modelnameorpath modelpath basemodel modelid", "model"),
    ("dataset datasetname", "task_options.dataset task"),
    ("env environment", "task"),
    ("rewards rewardfuncs rewardfunctions rewardfunc", "task_options.rewards task"),
    ("rewardweights", "task_options.reward_weights"),
    ("template prompttemplate", "task_options.template"),
    ("promptcolumn", "task_options.prompt_column"),
    ("answercolumn", "task_options.answer_column"),
    ("testfile", "task_options.test_file"),
    ("datadir", "data-dir task_options.data_dir"),
    ("systemprompt systemmessage", "chat.system"),
    ("enablethinking", "chat.template_args.enable_thinking"),
    ("maxnumseqs", "engine.max_sequences"),
    ("algorithm algo trainer", "method"),
    ("randomseed noiseseed", "seed"),
    ("outputdir outdir savedir logdir workdir output", "run-dir out"),
    ("savesteps saveevery savefreq saveinterval", "checkpoint.every"),
    ("savetotallimit", "checkpoint.keep"),
    ("evalsteps evalevery evalinterval testfreq", "eval.every"),
    ("numexamples maxexamples numsamples evalsize", "limit eval.problems"),
    ("wandbproject project projectname", "log.wandb"),
    ("reportto", "log.wandb log.tensorboard"),
    ("bf16 fp16 torchdtype precision", "engine.dtype"),
    ("lorar r", "grpo.lora_rank es.rank"),
    ("kl klcoef klcoeff", "grpo.beta"),
    ("ppoepochs updateepochs", "es.answer_reuse grpo.num_iterations"),
    ("targetkl maxkl", "es.max_drift"),
    ("filtergroups dynamicsampling", "es.skip_tied"),
    ("cliprange cliprangelow clipratio", "grpo.epsilon"),
    ("resume resumefromcheckpoint overwrite force", "on-existing"),
    # Commands.
    ("evaluate evaluation test", "eval"),
    ("upload publish", "push"),
    ("continue restart", "resume"),
    ("benchmark speed", "bench"),
    ("check info", "doctor"),
    ("run fit finetune", "train"),
)
_GREEDY = ("eval.temperature", "eval.top_p", "eval.top_k", "eval.min_p")
"""Not there, because evaluations in training are greedy; a setting of that name in [sampling] changes the training."""
LEAST_ABBREVIATION = 3  # characters
_ELSEWHERE = {word: here.split() for words, here in _WORDS_ELSEWHERE for word in words.split()}


def meant(name: str, valid: Iterable[str]) -> Sequence[str]:
    """Return the valid names, dotted or not, that `name` most likely stands for; none when it is like none."""
    names = list(dict.fromkeys(valid))
    if name in _GREEDY:
        return []
    whole, last = _plain(name), _plain(_last(name))
    if found := [known for known in names if _plain(known) == whole]:
        return found
    # The right name in the wrong table is the other common slip: `sigma` outside of [es].
    elsewhere = [
        known
        for known in _ELSEWHERE.get(last, ())
        if known in names or any(known.startswith(f"{free}.") for free in names)
    ]
    if found := [*elsewhere, *(known for known in names if _plain(_last(known)) == last and known not in elsewhere)]:
        return found
    by_last = {_last(known): known for known in names}
    # A long name of the table would make it like everything in it.
    others = [known for known in names if _table(known) != _table(name) or not _table(name)]
    if found := difflib.get_close_matches(name, others, n=1, cutoff=0.7):
        return found
    if near := difflib.get_close_matches(_last(name), by_last, n=1, cutoff=0.7):
        return [by_last[near[0]]]
    begun = [known for known in names if len(last) >= LEAST_ABBREVIATION and _plain(_last(known)).startswith(last)]
    return begun if len(begun) <= 2 else []


def did_you_mean(name: str, valid: Iterable[str], dash: str = "") -> str:
    """Return " Did you mean A or B?", or nothing; `dash` is put before the names of flags."""
    found = [dash + known for known in meant(name, valid)]
    return f" Did you mean {' or '.join(found)}?" if found else ""


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _table(name: str) -> str:
    return name.rpartition(".")[0]


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
