from benchmarks.language_model import CLIP, FRAMES, count_step, make_model


def test_the_share_of_clip_is_what_its_shapes_say():
    model = make_model(checkpointing=False)
    (through, step, kept), (vectors, *_) = (count_step(model, 2, with_clip) for with_clip in (True, False))
    pictures, tokens, width = 2 * FRAMES, 257, CLIP["hidden_size"]
    linear = 2 * tokens * (4 * width**2 + 2 * width * CLIP["intermediate_size"])
    layer = linear + 4 * tokens**2 * width
    ends = 2 * 256 * 3 * 14**2 * width + 2 * width * 768
    assert through - vectors == pictures * (CLIP["num_hidden_layers"] * layer + ends)
    _, recomputed, less = count_step(make_model(checkpointing=True), 2, with_clip=True)
    assert through < step < recomputed and less < kept / 5
