import gradio as gr
from fastapi import FastAPI


def add(number, kept):
    kept = (kept or 0) + int(number)
    return kept, kept


def shout(path):
    out = "/tmp/shouted.txt"
    with open(path) as source, open(out, "w") as made:
        made.write(source.read().upper())
    return out


with gr.Blocks() as demo:
    number, total, kept = gr.Number(label="number"), gr.Number(label="total"), gr.State(0)
    gr.Button("add").click(add, [number, kept], [total, kept], api_name="add")
    given, made = gr.File(), gr.File()
    gr.Button("shout").click(shout, given, made, api_name="shout")
app = gr.mount_gradio_app(FastAPI(), demo, path="/")
