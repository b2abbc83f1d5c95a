'use client';
import { useState } from 'react';
import { text } from './text.js';

export default function Page() {
  const [count, add] = useState(0);
  return <><p id="text">{text}</p><button onClick={() => add(count + 1)}>{count}</button></>;
}
