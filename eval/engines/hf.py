"""transformers as an engine of eval/engines/open.py."""

import contextlib
import gc
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ba_lora.errors import UserError, in_one_line
from ba_lora.models.load import keep_4bit_layout, require_weights, without_load_report
from ba_lora.models.source import hub_errors
from eval.engines.adapters import read_adapter
from eval.engines.base import Engine, EngineOptions, Sampling, encode_prompts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

DEFAULT_BATCH_SIZE = 32  # transformers only; vLLM schedules by itself


@dataclass
class _Row:
    """One completion in the making: `ids` are generated so far, `limit` is the most there may be."""

    prompt_ids: list[int]
    limit: int
    ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.ids)


class HFEngine(Engine):
    """transformers' generate: left padding with an attention mask, batched by length, adapters by PEFT."""

    kind = "hf"

    def __init__(self, base: str, adapters: Mapping[str, str], options: EngineOptions) -> None:
        super().__init__(base, adapters, options)
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        self.version = importlib.metadata.version("transformers")
        if options.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            raise UserError("attention=flash_attention_2 needs flash-attn: pip install flash-attn, or use sdpa")
        cuda = torch.cuda.is_available()
        with hub_errors(base, "model"), without_load_report():
            self._model, report = AutoModelForCausalLM.from_pretrained(
                base,
                revision=options.revision,
                dtype=getattr(torch, self.dtype),
                attn_implementation=options.attention,
                trust_remote_code=options.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `require_weights` names them
                device_map="auto" if cuda else None,
            )
        require_weights(report, base)
        keep_4bit_layout(self._model)
        self._model.config.use_cache = True
        self._model.generation_config = GenerationConfig()  # no hidden sampling defaults of the model's
        for name, folder in self.adapters.items():
            self._add_adapter(name, folder)
        self._model.eval()
        self._batch_size = options.batch_size or DEFAULT_BATCH_SIZE
        # Rows at their limit may idle beyond the context while others go on, if positions are a plain rotation: no
        # table to run out of, no frequencies that follow the longest row. Otherwise a batch stops for its shortest.
        rope = getattr(self.config, "rope_parameters", None) or {}
        self._may_idle = rope.get("rope_type") in ("default", "linear", "llama3", "yarn")

    def _add_adapter(self, name: str, folder: str) -> None:
        from peft import PeftModel

        try:
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(folder, adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(self._model, folder, adapter_name=name)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{folder} does not fit the base {self.base}: {in_one_line(error)}") from error

    def _generate_ids(
        self,
        encoded: list[list[int]],
        limits: list[int],
        settings: Sampling,
        *,
        adapter: str | None,
        progress: str | None,
    ) -> list[list[list[int]]]:
        import torch
        from tqdm import tqdm

        rows = [
            [_Row(ids, limit) for _ in range(settings.num_samples)] for ids, limit in zip(encoded, limits, strict=True)
        ]
        queue = [row for samples in rows for row in samples]
        batch_size = self._batch_size
        # Behind its virtual tokens PEFT ignores position ids: padding would move the prompt.
        unpadded = adapter is not None and read_adapter(self.adapters[adapter]).get("peft_type") == "PROMPT_TUNING"
        torch.manual_seed(settings.seed)
        with (
            self._active(adapter),
            torch.inference_mode(),
            tqdm(total=len(queue), desc=progress, unit="text", file=sys.stderr, disable=progress is None) as bar,
        ):
            while queue:
                queue.sort(key=lambda row: row.length)  # alike lengths pad little; the longest first meet any OOM first
                batch, queue = queue[-batch_size:], queue[:-batch_size]
                if unpadded:
                    queue += [row for row in batch if row.length != batch[-1].length]
                    batch = [row for row in batch if row.length == batch[-1].length]
                try:
                    unfinished = self._extend(batch, settings)
                except torch.OutOfMemoryError:
                    unfinished = None
                if unfinished is None:  # outside the handler, whose traceback would hold the memory
                    if len(batch) == 1:
                        raise UserError(
                            f"out of memory with one text of {batch[0].length} tokens: set dtype=bfloat16, a smaller "
                            "max_new_tokens, or use --engine vllm"
                        )
                    batch_size = max(1, len(batch) // 2)
                    queue += batch
                    gc.collect()
                    torch.cuda.empty_cache()
                    tqdm.write(f"out of memory: going on with batch_size={batch_size}", file=sys.stderr)
                    continue
                queue += unfinished
                bar.update(len(batch) - len(unfinished))
        return [[row.ids for row in samples] for samples in rows]

    def nll(self, texts: Sequence[str], *, adapter: str | None = None) -> list[tuple[float, int]]:
        """Return of each text the negative log-likelihood in nats, summed over its tokens, and the number of these.

        Each text is encoded as a prompt is and ends with EOS; its first token is given, not predicted. One beyond the
        context is cut to it, which is told.
        """
        import torch

        eos = [self.tokenizer.eos_token_id]
        whole = [[*ids, *eos] for ids in encode_prompts(self.tokenizer, texts)]
        encoded = [ids[: self.context] for ids in whole]
        if cut := sum(len(ids) > len(kept) for ids, kept in zip(whole, encoded, strict=True)):
            print(f"{cut} of {len(texts)} texts are cut to the context of {self.context} tokens", file=sys.stderr)
        self.check_tokens(encoded)
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        found = [(0.0, 0)] * len(encoded)
        with self._active(adapter), torch.inference_mode():
            for start in range(0, len(order), self._batch_size):
                places = order[start : start + self._batch_size]
                batch = [encoded[place] for place in places]
                width = len(batch[-1])
                ids_BT = torch.tensor([row + [eos[0]] * (width - len(row)) for row in batch])
                mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
                logits_BTV = self._model(
                    input_ids=ids_BT.to(self._model.device), attention_mask=mask_BT.to(self._model.device)
                ).logits[:, -width:]  # behind virtual tokens, of an adapter that has them
                targets_BT = ids_BT[:, 1:].masked_fill(mask_BT[:, 1:] == 0, -100).to(logits_BTV.device)
                nll = torch.nn.functional.cross_entropy(
                    logits_BTV[:, :-1].flatten(0, 1).float(), targets_BT.flatten(), reduction="none"
                )
                sums_B = nll.view(targets_BT.shape).sum(1, dtype=torch.float64).tolist()
                for place, row, total in zip(places, batch, sums_B, strict=True):
                    found[place] = (total, len(row) - 1)
        return found

    def log_probs(
        self, texts: Sequence[tuple[str, str]], *, adapter: str | None = None
    ) -> "Iterator[tuple[int, list[int], torch.Tensor, torch.Tensor]]":
        """Yield of each (prompt, continuation), in any order, its number, and of the continuation's T tokens where
        each ends in its text (characters), the ids [T], and the log-probabilities in nats, float32 [T, vocabulary].

        Both are encoded together, without EOS; a token over the seam is the continuation's. Raises UserError for a
        tokenizer that does not tell where its tokens are, and for texts beyond the context.
        """
        import torch

        if not self.tokenizer.is_fast:
            raise UserError(f"{self.base}: a fast tokenizer is needed, which tells where its tokens are in the text")
        encoded = self.tokenizer([prompt + more for prompt, more in texts], return_offsets_mapping=True)
        rows, places = encoded["input_ids"], encoded["offset_mapping"]
        self.check_tokens(rows)
        if self.context is not None and max(map(len, rows)) > self.context:
            raise UserError(f"{self.base}: a text has {max(map(len, rows))} tokens, the context is {self.context}")
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        with self._active(adapter), torch.inference_mode():
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                width = len(rows[batch[-1]])
                ids_BT = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in batch])
                mask_BT = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in batch])
                logits_BTV = self._model(
                    input_ids=ids_BT.to(self._model.device), attention_mask=mask_BT.to(self._model.device)
                ).logits[:, -width:]  # behind virtual tokens, of an adapter that has them
                for index, ids_T, logits_TV in zip(batch, ids_BT, logits_BTV, strict=True):
                    seam, length = len(texts[index][0]), len(rows[index])
                    first = next(t for t in range(length) if places[index][t][1] > seam)
                    ends = [end - seam for _, end in places[index][first:length]]
                    log_probs_TV = logits_TV[first - 1 : length - 1].float().log_softmax(-1).cpu()
                    yield index, ends, ids_T[first:length], log_probs_TV

    @contextlib.contextmanager
    def _active(self, adapter: str | None) -> Iterator[None]:
        """Make `adapter`, or for None the bare base, answer."""
        if not self.adapters:
            yield
        elif adapter is None:
            with self._model.disable_adapter():
                yield
        else:
            self._model.set_adapter(adapter)
            yield

    def _extend(self, batch: list[_Row], settings: Sampling) -> list[_Row]:
        """Generate for one batch, into the rows' `ids`; return the rows that are not at their end."""
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        width = max(row.length for row in batch)
        room = [row.limit - len(row.ids) for row in batch]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (self.ends or [0])[0]
        input_ids = torch.full((len(batch), width), pad)  # (rows, width)
        mask = torch.zeros_like(input_ids)
        for index, row in enumerate(batch):
            input_ids[index, width - row.length :] = torch.tensor([*row.prompt_ids, *row.ids])
            mask[index, width - row.length :] = 1
        draw = {"do_sample": False}
        if settings.temperature > 0:
            draw = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        starts = [width - len(row.ids) for row in batch]
        stopper = _RowStopper(self.tokenizer, settings.stop, starts=starts, limits=[width + n for n in room])
        output = self._model.generate(
            input_ids=input_ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            generation_config=GenerationConfig(
                max_new_tokens=max(room) if self._may_idle else min(room),
                eos_token_id=self.ends or None,
                pad_token_id=pad,
                use_cache=True,
                **draw,
            ),
            stopping_criteria=StoppingCriteriaList([stopper]),
        )
        unfinished = []
        for index, row in enumerate(batch):
            new = output[index, width : stopper.ended_at.get(index)].tolist()
            position = next((i for i, token in enumerate(new) if token in self.ends), None)
            row.ids = row.ids + (new if position is None else new[: position + 1])
            if position is None and index not in stopper.ended_at:
                unfinished.append(row)
        return unfinished

    def close(self) -> None:
        import torch

        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _RowStopper:
    """A stopping criterion: a row is done at its own limit, or when one of `stops` stands in what it generated.

    starts, limits: for each row the columns where its generated text begins, and where it must end. `ended_at`
    collects row → the column where the row ended. Only the last tokens are decoded: a stop string of b bytes lies in
    the last b + 4 tokens at the moment it is complete.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        stops: Sequence[str],
        *,
        starts: Sequence[int],
        limits: Sequence[int],
    ) -> None:
        self.tokenizer, self.stops, self.starts, self.limits = tokenizer, stops, starts, limits
        self.window = max((len(stop.encode()) for stop in stops), default=0) + 4
        self.ended_at: dict[int, int] = {}

    def __call__(self, input_ids: "torch.Tensor", scores: Any, **kwargs: Any) -> "torch.Tensor":
        import torch

        columns = input_ids.shape[1]
        rows = input_ids.tolist() if self.stops else None
        for index in range(len(input_ids)):
            if index in self.ended_at:
                continue
            if columns >= self.limits[index] or (rows and self._holds_stop(rows[index], self.starts[index], columns)):
                self.ended_at[index] = columns
        done = [index in self.ended_at for index in range(len(input_ids))]
        return torch.tensor(done, device=input_ids.device, dtype=torch.bool)

    def _holds_stop(self, row: list[int], start: int, columns: int) -> bool:
        tail = row[max(start, columns - self.window) :]
        text = self.tokenizer.decode(tail, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self.stops)
