import streamlit as st

st.session_state.setdefault("n", 0)
if st.button("more"):
    st.session_state.n += 1
st.write(f"n is {st.session_state.n}.")
